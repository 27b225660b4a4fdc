"""The mesh of devices: axes `data`, `expert` and `model`, always all three."""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from glm5_jax.chunks import Region, overlap
from glm5_jax.collectives import DATA, EXPERT, MESH_AXES, MODEL
from glm5_jax.errors import InputError

Sizes = dict[str, int]  # of the mesh axes
Job = Literal["run", "train"]

# Past this many devices, dividing heads makes products too narrow and sums too frequent to pay.
_MOST_MODEL = 8
_FETCHED_WHOLE = 2**26  # bytes of a shard; JAX keeps them, so that of larger ones parts are fetched
# From here on, gathering a layer's experts takes little enough memory.
_ENOUGH_EXPERT = 16


def parse_mesh(text: str, num_devices: int) -> Sizes:
    """Reads `data=2,expert=2,model=2`; axes left out have size 1.

    Raises:
      InputError: it is malformed, or not for that many devices; the nearest meshes are named.
    """
    sizes = dict.fromkeys(MESH_AXES, 1)
    seen = set()
    for part in text.split(","):
        axis, equals, size = (word.strip() for word in part.partition("="))
        if axis not in sizes or not equals or not re.fullmatch(r"[1-9]\d{0,8}", size):
            raise InputError(
                f"--mesh {text!r:.80}: {part!r:.40} is not an axis with its size, expected "
                "data=D,expert=E,model=M with sizes of at least 1, or auto"
            )
        if axis in seen:
            raise InputError(f"--mesh {text!r:.80}: {axis} is given twice, expected once")
        seen.add(axis)
        sizes[axis] = int(size)
    product = math.prod(sizes.values())
    if product != num_devices:
        near = sorted(factorisations(num_devices), key=lambda other: _distance(sizes, other))
        raise InputError(
            f"--mesh {format_mesh(sizes)} is for {product} devices, expected {num_devices}, "
            f"such as {' or '.join(format_mesh(other) for other in near[:2])}"
        )
    return sizes


def choose_mesh(num_devices: int, job: Job, check: Callable[[Sizes], None]) -> Sizes:
    """A sensible mesh for the devices at hand.

    To run a model, up to eight devices share every layer and the rest share experts and batch. To
    train, batches and weights are divided over all devices, experts over up to sixteen, and layers
    only where they must be.

    Args:
      check: raises `InputError` if a mesh will not do.

    Raises:
      InputError: no mesh of that many devices will do.
    """

    def badness(sizes: Sizes) -> tuple[int, ...]:
        if job == "train":
            return sizes[MODEL], -min(sizes[EXPERT], _ENOUGH_EXPERT), sizes[EXPERT]
        too_many = max(0, sizes[MODEL] - _MOST_MODEL)
        return too_many, -sizes[MODEL], sizes[DATA]

    reasons = []
    for sizes in sorted(factorisations(num_devices), key=badness):
        try:
            check(sizes)
        except InputError as error:
            reasons.append(str(error))
        else:
            return sizes
    raise InputError(
        f"no mesh of {num_devices} devices fits: {'; '.join(list(dict.fromkeys(reasons))[:5])}"
    )


def factorisations(num_devices: int) -> Iterator[Sizes]:
    """Every mesh of that many devices."""
    divisors = [size for size in range(1, num_devices + 1) if num_devices % size == 0]
    for data, expert in itertools.product(divisors, divisors):
        if num_devices % (data * expert) == 0:
            yield {DATA: data, EXPERT: expert, MODEL: num_devices // (data * expert)}


def format_mesh(sizes: Mapping[str, int]) -> str:
    """A mesh as `--mesh` takes it."""
    return ",".join(f"{axis}={sizes[axis]}" for axis in MESH_AXES)


def announcement(mesh: Mesh) -> str:
    """What a user is told of a mesh."""
    return f"{mesh.size} {mesh.devices.flat[0].device_kind} devices: {format_mesh(mesh.shape)}"


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh, neighbours along `model` being as close as the hardware allows."""
    shape = [sizes[axis] for axis in MESH_AXES]
    grid = mesh_utils.create_device_mesh(
        shape, devices or jax.devices(), allow_split_physical_axes=True
    )
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))


def single_device() -> Mesh:
    """The mesh of one device, the first."""
    return make_mesh(dict.fromkeys(MESH_AXES, 1), jax.local_devices()[:1])


def put(array: np.ndarray, mesh: Mesh, spec: PartitionSpec) -> jax.Array:
    """An array that every process has whole, divided over the devices."""
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])


def fetch(array: jax.Array) -> np.ndarray:
    """A whole array, on every process."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def fetch_part(array: jax.Array | np.ndarray, wanted: Region) -> np.ndarray:
    """A part of an array, on every process, in little more memory than it takes."""
    if isinstance(array, np.ndarray):
        return np.asarray(array[wanted])
    part = np.zeros([each.stop - each.start for each in wanted], array.dtype)
    for shard in array.addressable_shards:
        held = tuple(
            slice(*each.indices(size)[:2])
            for each, size in zip(shard.index, array.shape, strict=True)
        )
        # Of equal shards, which may be in several processes, one counts.
        if shard.replica_id == 0 and (common := overlap(held, wanted)) is not None:
            in_held, in_wanted = common
            part[in_wanted] = _fetch_slice(shard.data, in_held)
    if array.is_fully_addressable:
        return part
    # Every byte comes from one process and is zero in the others, so that their sum is the part.
    summed = multihost_utils.broadcast_one_to_all(part.reshape(-1).view(np.uint8), is_source=True)
    return np.asarray(summed).view(part.dtype).reshape(part.shape)


def _fetch_slice(array: jax.Array, region: Region) -> np.ndarray:
    """A slice of an array on one device."""
    if array.nbytes <= _FETCHED_WHOLE:
        return np.asarray(array)[region]
    starts = [each.start for each in region]
    sizes = [each.stop - each.start for each in region]
    with jax.set_mesh(Mesh(np.empty((), object), ())):  # not on the devices of any mesh in force
        return np.asarray(jax.lax.dynamic_slice(array, starts, sizes))


def _distance(sizes: Sizes, other: Sizes) -> float:
    return sum(abs(math.log(sizes[axis] / other[axis])) for axis in MESH_AXES)
