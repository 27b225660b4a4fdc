"""What accelerators are published to do: memory, arithmetic, bandwidth, one chip a row.

FLOP/s are dense, bandwidths are one way. Memory is marketed in GB that turn out to be 2**30 bytes.
"""

import dataclasses
from collections.abc import Mapping

GIB = 2**30
_MIB = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """The constants of one chip; `per_device` gives those of one JAX device."""

    name: str
    devices: int  # JAX devices that a topology of libtpu counts one chip as
    hbm_bytes: int
    usable_hbm_bytes: int  # what one program can have
    flops: Mapping[str, float]  # a second, by the operands' dtype
    hbm_bandwidth: float  # bytes a second, as are the others
    link_bandwidth: float  # to the rest of its slice or NVLink domain, over all links together
    network_bandwidth: float  # to other slices or hosts
    source: tuple[str, ...]

    def rate(self, dtype: str) -> float:
        """FLOP/s of a product of operands of `dtype`, a name as in `Costs.flops`.

        Raises:
          ValueError: the chip has no rate for it.
        """
        name = "float8" if dtype.startswith("float8") else dtype
        if name not in self.flops:
            raise ValueError(f"{self.name} has no FLOP/s for {dtype}, only {sorted(self.flops)}")
        return self.flops[name]

    @property
    def per_device(self) -> "Chip":
        """One device's share of every constant."""
        return dataclasses.replace(
            self,
            devices=1,
            hbm_bytes=self.hbm_bytes // self.devices,
            usable_hbm_bytes=self.usable_hbm_bytes // self.devices,
            flops={dtype: rate / self.devices for dtype, rate in self.flops.items()},
            hbm_bandwidth=self.hbm_bandwidth / self.devices,
            link_bandwidth=self.link_bandwidth / self.devices,
            network_bandwidth=self.network_bandwidth / self.devices,
        )


_CLOUD = "https://docs.cloud.google.com/tpu/docs/"
_BOOK = "https://jax-ml.github.io/scaling-book/"
_PRECISION = "https://docs.jax.dev/en/latest/jax.lax.html#jax.lax.Precision"
_IRONWOOD = _CLOUD + "tpu7x"  # compares v5p, v6e and TPU7x in one table
_DGX_B200 = "https://docs.nvidia.com/dgx/dgxb200-user-guide/introduction-to-dgxb200.html"
_DGX_HOPPER = "https://docs.nvidia.com/dgx/dgxh100-user-guide/introduction-to-dgxh100.html"


def _tpu_flops(bfloat16: float) -> dict[str, float]:
    """A float32 product is one bfloat16 pass by default, and six at the highest precision."""
    return {"bfloat16": bfloat16, "float32": bfloat16, "float32_highest": bfloat16 / 6}


def _gpu_flops(tensor: float, tensor_float32: float, vector: float) -> dict[str, float]:
    """A float32 product is TensorFloat-32 by default, and off the tensor cores at the highest."""
    half = {"bfloat16": tensor, "float16": tensor, "float8": 2 * tensor}
    return half | {"float32": tensor_float32, "float32_highest": vector}


# A TPU's usable memory is the "available HBM" that libtpu 0.0.42 names when a program compiled
# ahead of time does not fit. A GPU's is what its driver reports: compilers know no bound there, and
# JAX takes three quarters of it unless XLA_PYTHON_CLIENT_MEM_FRACTION says more.
_ALL = (
    Chip(
        name="v4",
        devices=2,  # without megacore, which ahead-of-time topologies do not have
        hbm_bytes=32 * GIB,
        usable_hbm_bytes=2 * int(15.25 * GIB),
        flops=_tpu_flops(275e12),
        hbm_bandwidth=1200e9,
        link_bandwidth=6 * 45e9,
        network_bandwidth=6.25e9,
        source=(_CLOUD + "v4", _BOOK + "tpus", _PRECISION),
    ),
    Chip(
        name="v5e",
        devices=1,
        hbm_bytes=16 * GIB,
        usable_hbm_bytes=int(15.75 * GIB),
        flops=_tpu_flops(197e12),
        hbm_bandwidth=819e9,
        link_bandwidth=200e9,
        network_bandwidth=3.125e9,  # 6.4 Tbit/s for a pod of 256
        source=(_CLOUD + "v5e", _BOOK + "tpus", _PRECISION),
    ),
    Chip(
        name="v5p",
        devices=1,
        # Google's table says 95, less than a program can have; the book and JAX's tpu_info say 96.
        hbm_bytes=96 * GIB,
        usable_hbm_bytes=int(95.74 * GIB),
        flops=_tpu_flops(459e12) | {"float8": 459e12},
        hbm_bandwidth=2765e9,
        link_bandwidth=600e9,
        network_bandwidth=6.25e9,
        source=(_CLOUD + "v5p", _IRONWOOD, _BOOK + "tpus", _PRECISION),
    ),
    Chip(
        name="v6e",
        devices=1,
        hbm_bytes=32 * GIB,
        usable_hbm_bytes=int(31.25 * GIB),
        flops=_tpu_flops(918e12) | {"float8": 918e12},
        hbm_bandwidth=1638e9,
        link_bandwidth=400e9,
        network_bandwidth=12.5e9,
        source=(_CLOUD + "v6e", _IRONWOOD, _PRECISION),
    ),
    Chip(
        name="v7",
        devices=2,
        hbm_bytes=192 * GIB,
        usable_hbm_bytes=2 * int(94.75 * GIB),
        flops=_tpu_flops(2307e12) | {"float8": 4614e12},
        hbm_bandwidth=7380e9,
        link_bandwidth=600e9,
        network_bandwidth=12.5e9,
        source=(_IRONWOOD, _PRECISION),
    ),
    Chip(
        name="h100",
        devices=1,
        hbm_bytes=80 * GIB,
        usable_hbm_bytes=81559 * _MIB,
        flops=_gpu_flops(989.4e12, 494.7e12, 66.9e12),
        hbm_bandwidth=3.35e12,
        link_bandwidth=450e9,
        network_bandwidth=50e9,
        source=("https://www.nvidia.com/en-us/data-center/h100/", _DGX_HOPPER, _BOOK + "gpus"),
    ),
    Chip(
        name="h200",
        devices=1,
        hbm_bytes=141 * GIB,
        usable_hbm_bytes=143771 * _MIB,
        flops=_gpu_flops(989.4e12, 494.7e12, 66.9e12),
        hbm_bandwidth=4.8e12,
        link_bandwidth=450e9,
        network_bandwidth=50e9,
        source=("https://www.nvidia.com/en-us/data-center/h200/", _DGX_HOPPER, _BOOK + "gpus"),
    ),
    Chip(
        name="b200",
        devices=1,
        hbm_bytes=180 * GIB,
        usable_hbm_bytes=183359 * _MIB,
        flops=_gpu_flops(2250e12, 1125e12, 80e12),
        hbm_bandwidth=8e12,
        link_bandwidth=900e9,
        network_bandwidth=50e9,
        source=("https://www.nvidia.com/en-us/data-center/hgx/", _DGX_B200, _BOOK + "gpus"),
    ),
)

CHIPS: Mapping[str, Chip] = {chip.name: chip for chip in _ALL}
