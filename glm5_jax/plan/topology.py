"""The devices that a plan is for, none of which need be here."""

import contextlib
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from glm5_jax.errors import InputError
from glm5_jax.plan.chips import CHIPS, Chip

# Chips that libtpu compiles for: its names, and how many dimensions their links span.
_TPUS = {"v4": ("v4", 3), "v5e": ("v5e", 2), "v5p": ("v5p", 3), "v6e": ("v6e", 2)}
_TPUS |= {"v7": ("tpu7x", 3)}
_GPUS_PER_HOST = 8


class Topology(NamedTuple):
    """Devices of one kind."""

    name: str
    chip: Chip
    devices: Sequence[Any]
    platform: str  # whose code is counted: tpu or cuda

    @property
    def num_chips(self) -> int:
        """Chips, of which each may be several devices."""
        return len(self.devices) // self.chip.devices

    def bandwidth(self, group: Sequence[Any]) -> float:
        """Bytes a second that a device can send to a group of devices that it exchanges with.

        On TPU that is the share of its links that lie along the dimensions that the group spans; on
        GPU, NVLink within a host and the network beyond.
        """
        chip = self.chip.per_device
        if self.platform != "tpu":
            is_near = len({device.id // _GPUS_PER_HOST for device in group}) == 1
            return chip.link_bandwidth if is_near else chip.network_bandwidth
        spanned = sum(
            len(set(places)) > 1 for places in zip(*(d.coords for d in group), strict=True)
        )
        _, dimensions = _TPUS[self.chip.name]
        return chip.link_bandwidth * max(1, spanned) / dimensions


def find_topology(text: str) -> Topology:
    """Reads `v6e:16x16` or `h200:16`. Must run before JAX has looked for devices.

    TPUs are described by libtpu; virtual CPU devices stand in for GPUs.

    Raises:
      InputError: there is no such chip or topology, or libtpu is not installed.
    """
    name, _, layout = text.partition(":")
    if name not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", layout):
        raise InputError(
            f"--topology {text!r:.80}: expected CHIP:AxB such as v6e:16x16, v5p:8x8x8 or h200:16, "
            f"with one of the chips {', '.join(CHIPS)}"
        )
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot be read without a device
    sizes = [int(size) for size in layout.split("x")]
    if name not in _TPUS:
        return Topology(text, CHIPS[name], _stand_ins(math.prod(sizes)), "cuda")
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"--topology {text}: libtpu, which compiles for TPUs, is not installed; expected "
            "pip install 'glm5-jax[tpu]'"
        )
    return Topology(text, CHIPS[name], _describe(text, name, sizes), "tpu")


def _stand_ins(number: int) -> Sequence[Any]:
    with contextlib.suppress(RuntimeError):  # JAX has looked for devices already
        jax.config.update("jax_num_cpu_devices", number)
    devices = jax.devices("cpu")
    if len(devices) < number:
        raise InputError(
            f"--topology: {number} GPUs need as many virtual CPU devices, expected "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={number}"
        )
    return devices[:number]


def _describe(text: str, name: str, sizes: list[int]) -> Sequence[Any]:
    # Nothing here touches a TPU: there is no machine's server to ask, and none to have alone.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    libtpu_name, dimensions = _TPUS[name]

    def resolve(sizes: Sequence[int]) -> Sequence[Any]:
        layout = f"{libtpu_name}:{'x'.join(map(str, sizes))}"
        try:
            with silenced():
                return topologies.get_topology_desc(platform="tpu", topology_name=layout).devices
        except jax.errors.JaxRuntimeError as error:
            if "INVALID_ARGUMENT" in str(error):
                return ()
            raise InputError(f"--topology {text}: libtpu failed: {error!s:.300}") from None

    if len(sizes) == dimensions and (devices := resolve(sizes)):
        return devices
    padded = (sizes + [1] * dimensions)[:dimensions]
    by_distance = sorted(_powers(dimensions), key=lambda other: _distance(padded, other))
    legal = (f"{name}:{'x'.join(map(str, other))}" for other in by_distance if resolve(other))
    near = list(itertools.islice(legal, 2))
    raise InputError(
        f"--topology {text}: libtpu knows no such topology, expected for instance "
        f"{' or '.join(near)}"
    )


def _powers(dimensions: int) -> Iterator[tuple[int, ...]]:
    powers = [1, 2, 4, 8, 16]
    return (sizes for sizes in itertools.product(powers, repeat=dimensions) if max(sizes) > 1)


def _distance(sizes: Sequence[int], other: Sequence[int]) -> float:
    return sum(abs(math.log(a / b)) for a, b in zip(sizes, other, strict=True))


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Keeps what libtpu writes to standard error, which says nothing of use, from being seen."""
    before = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
