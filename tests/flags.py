"""What XLA is told in tests, which spend their time compiling and not computing."""

import importlib.metadata

_JAXLIB = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))


def xla_flags(num_devices: int) -> str:
    """Virtual devices, and a compiler that does not try hard."""
    flags = [
        f"--xla_force_host_platform_device_count={num_devices}",
        "--xla_backend_optimization_level=0",
    ]
    if _JAXLIB < (0, 11):  # later ones end the process at a flag that they do not know
        flags.append("--xla_cpu_use_fusion_emitters=false")  # compiles in two thirds of the time
    return " ".join(flags)
