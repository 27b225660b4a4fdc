"""Which of how many processes this is: from arguments, the environment or the cluster."""

import argparse
import os
import urllib.request
from importlib import import_module
from importlib.util import find_spec

from glm5_jax.errors import InputError
from glm5_jax.rendezvous import Member

_WORKERS = "computeMetadata/v1/instance/attributes/worker-network-endpoints"


def read_member(args: argparse.Namespace) -> tuple[Member | None, int]:
    """What the arguments or the environment say of this process, and how long to wait for all.

    Raises:
      InputError: they say a part of it only, or what cannot be.
    """
    seconds = _integer("--start-timeout", args.start_timeout, 1, 10**6)
    sources = {
        "--coordinator": (args.coordinator, "JAX_COORDINATOR_ADDRESS"),
        "--num-processes": (args.num_processes, "JAX_NUM_PROCESSES"),
        "--process-id": (args.process_id, "JAX_PROCESS_ID"),
    }
    given: dict[str, tuple[str, str]] = {}  # what it was given as, and its value
    for flag, (value, variable) in sources.items():
        if value is not None:
            given[flag] = (flag, value)
        elif variable in os.environ:
            given[flag] = (variable, os.environ[variable])
    alone = [name for name, _ in given.values()]
    if not given or (alone == ["JAX_COORDINATOR_ADDRESS"] and find_cluster() is not None):
        return None, seconds  # JAX itself combines that variable with what the cluster says
    if missing := [flag for flag in sources if flag not in given]:
        raise InputError(
            f"{' and '.join(alone)} without {' and '.join(missing)}: expected all of "
            f"{', '.join(sources)}, or none"
        )
    host, port = _address(*given["--coordinator"])
    count = _integer(*given["--num-processes"], 1, 10**6)
    index = _integer(*given["--process-id"], 0, count - 1)
    return Member(host, port, count, index), seconds


def find_cluster() -> str | None:
    """The cluster that says of itself that it runs several processes, of those that JAX knows."""
    step = {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"}
    # Within salloc, SLURM_NTASKS speaks of the allocation, and the shell is a step of one task.
    if (
        step <= os.environ.keys()
        and _several("SLURM_NTASKS")
        and not _alone("SLURM_STEP_NUM_TASKS")
    ):
        return "Slurm"
    if _several("OMPI_COMM_WORLD_SIZE"):
        return "Open MPI"
    if "tpu" in os.environ.get("JAX_PLATFORMS", "tpu"):
        return _find_tpu_cluster()
    return None


def _find_tpu_cluster() -> str | None:
    names = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    if "," in (names or "") or _several("MEGASCALE_NUM_SLICES"):
        return "TPU workers"
    import_module("jax")  # sets TPU_SKIP_MDS_QUERY where no TPU is attached
    if names or "TPU_SKIP_MDS_QUERY" in os.environ or find_spec("libtpu") is None:
        return None
    return "a TPU pod slice" if "," in _tpu_endpoints() else None


def _tpu_endpoints() -> str:
    """The workers of this TPU VM's slice, with commas between; nothing if nobody knows."""
    host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{host}/{_WORKERS}", headers={"Metadata-Flavor": "Google"}
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=5) as answer:
            return str(answer.read().decode())
    except OSError:  # a TPU that is not on Google Compute Engine has one worker
        return ""


def _several(variable: str) -> bool:
    value = os.environ.get(variable, "")
    return value.isdecimal() and int(value) > 1


def _alone(variable: str) -> bool:
    return os.environ.get(variable) == "1"


def _integer(name: str, text: str, low: int, high: int) -> int:
    if not text.isdecimal() or not low <= int(text) <= high:
        raise InputError(f"{name} is {text!r:.80}, expected an integer from {low} to {high}")
    return int(text)


def _address(name: str, text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(
            f"{name} is {text!r:.80}, expected HOST:PORT with a port from 1 to {2**16 - 1}"
        )
    return host, int(port)
