"""The axes of the mesh, and all that crosses devices along them.

The model runs inside one `jax.shard_map`, every device on its own shards, and calls these functions
where shards must meet. Outside of it no axis is present, a device has everything, and each of them
returns what it was given.

JAX keeps track of the axes along which a value differs from device to device, and derives from
that what a gradient must be summed over: a value is `spread` where devices begin to do different
things with it, and `total` makes a sum of what they did.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

Tree = TypeVar("Tree")
Axes = tuple[str, ...]

DATA, EXPERT, MODEL = "data", "expert", "model"
MESH_AXES = (DATA, EXPERT, MODEL)
BATCH = (DATA, EXPERT)  # what the rows of a batch are divided over

_stood_in_for: contextvars.ContextVar[str | None] = contextvars.ContextVar("stood in for")


def _present(axes: Axes) -> Axes:
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(axis for axis in axes if axis in manual)


def _crossed(axes: Axes) -> Axes:
    """Those present along which there are several devices.

    XLA leaves collectives of one device in, and lays their operands out as several would need them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in _present(axes) if mesh.shape[axis] > 1)


def platform() -> str:
    """The kind of device that the program at hand is for: cpu, gpu or tpu."""
    if (other := _stood_in_for.get(None)) is not None:
        return other
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else str(device.platform)


@contextlib.contextmanager
def standing_in_for(platform: str) -> Iterator[None]:
    """Has programs traced as those of another kind of device, unless they were traced before.

    They can be run all the same: what differs is which of several equal ways is taken.
    """
    token = _stood_in_for.set(platform)
    try:
        yield
    finally:
        _stood_in_for.reset(token)


def num_shards(axes: Axes) -> int:
    """Into how many shards the axes divide what they shard."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in _present(axes))


def shard_index(axes: Axes) -> jax.Array:
    """Which of these shards is this device's."""
    present = _present(axes)
    return jax.lax.axis_index(present) if present else jnp.zeros((), jnp.int32)


def total(x: Tree, axes: Axes) -> Tree:
    """The sum over the shards; every device gets it."""
    return jax.lax.psum(x, _present(axes))


def total_share(x: jax.Array, axes: Axes, dim: int) -> jax.Array:
    """The sum over the shards, of which every device gets its part along a dimension."""
    if not (crossed := _crossed(axes)):
        return x
    return jax.lax.psum_scatter(x, crossed, scatter_dimension=dim, tiled=True)


def largest(x: jax.Array, axes: Axes) -> jax.Array:
    """The elementwise maximum over the shards. It has no gradient."""
    present = _present(axes)
    return jax.lax.pmax(x, present) if present else x


def gathered(x: jax.Array, axes: Axes, dim: int) -> jax.Array:
    """The shards' parts, one after the other along a dimension."""
    crossed = _crossed(axes)
    return jax.lax.all_gather(x, crossed, axis=dim, tiled=True) if crossed else x


def published(x: jax.Array, axes: Axes, dim: int) -> jax.Array:
    """`gathered`, known to be equal on all devices of the axes, so that it can leave the shards."""
    if not (present := _present(axes)):
        return x
    return jax.lax.all_gather(x, present, axis=dim, tiled=True, to="invarying")


def exchanged(x: jax.Array, axes: Axes, split: int, join: int) -> jax.Array:
    """Hands shard i the i-th part along `split`; the parts received are joined along `join`."""
    if not (crossed := _crossed(axes)):
        return x
    return jax.lax.all_to_all(x, crossed, split_axis=split, concat_axis=join, tiled=True)


def ragged(
    x: jax.Array,
    received: jax.Array,
    offset_N: jax.Array,
    size_N: jax.Array,
    lands_N: jax.Array,
    received_N: jax.Array,
    axes: Axes,
) -> jax.Array:
    """Hands each of N shards some rows of `x`, writing those received into an array.

    Args:
      received: what is returned where no row lands.
      offset_N: the first row for each shard.
      size_N: how many rows each shard gets.
      lands_N: where they land with each shard.
      received_N: how many rows each shard sends here.
    """
    x, received, *numbers = alike(x, received, offset_N, size_N, lands_N, received_N)
    return jax.lax.ragged_all_to_all(x, received, *numbers, axis_name=_present(axes))


def spread(x: Tree, axes: Axes) -> Tree:
    """Equal values that devices will do different things with; the gradient is their sum."""
    return jax.tree.map(lambda leaf: _varying(leaf, _present(axes)), x)


def alike(*trees: Any) -> tuple[Any, ...]:
    """The same values, spread over all the axes that any of them differs along.

    Loops and functions with gradients of their own need operands that agree in this.
    """
    axes = {axis for leaf in jax.tree.leaves(trees) for axis in jax.typeof(leaf).mat.varying}
    ordered = tuple(axis for axis in MESH_AXES if axis in axes)
    return tuple(jax.tree.map(lambda leaf: _varying(leaf, ordered), tree) for tree in trees)


def share_length(size: int, axes: Axes) -> int:
    """How long a share is of a dimension, padded to a multiple of the shards."""
    return -(-size // num_shards(axes))


def padded(x: jax.Array, axes: Axes, dim: int) -> jax.Array:
    """With zeros at the end of a dimension, so that shards divide it evenly."""
    size = x.shape[dim]
    padding = [(0, 0)] * x.ndim
    padding[dim] = (0, share_length(size, axes) * num_shards(axes) - size)
    return jnp.pad(x, padding)


def share(x: jax.Array, axes: Axes, dim: int) -> jax.Array:
    """This shard's part of an equal value, along a dimension padded for the shards."""
    length = share_length(x.shape[dim], axes)
    start = shard_index(axes) * length
    return jax.lax.dynamic_slice_in_dim(padded(x, axes, dim), start, length, dim)


def joined(part: jax.Array, axes: Axes, dim: int, size: int) -> jax.Array:
    """The parts that `share` made of a dimension of the given size, without the padding."""
    return jax.lax.slice_in_dim(gathered(part, axes, dim), 0, size, axis=dim)


def _varying(x: jax.Array, axes: Axes) -> jax.Array:
    missing = tuple(axis for axis in axes if axis not in jax.typeof(x).mat.varying)
    return jax.lax.pcast(x, missing, to="varying") if missing else x
