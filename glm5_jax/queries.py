"""Work on long sequences done a block of queries at a time, so that memory stays linear."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from glm5_jax.collectives import platform

Result = TypeVar("Result")

# What one block of queries may hold at once. On a CPU, small enough for its caches to matter; on an
# accelerator, so large that the keys, which every block reads again, are not read often.
BLOCK_BYTES = 32 * 2**20
_ACCELERATOR_BLOCK_BYTES = 2**30
# On a CPU, of rows that are gathered to be used at once: what fits the cache of a core or two.
_GATHERED_BLOCK_BYTES = 8 * 2**20

_SHORTEST_BLOCK = 512  # of queries, that products with keys are still fast for on a CPU
# How many lengths of a sequence a program has versions for, on a CPU.
LENGTHS = 4
# Names what a function of `map_queries` wants kept for its gradient instead of computed again.
KEPT = "kept"

# A multiply-add on a gathered row costs about this many on rows read in order: from 3.3 to 4.7 on
# two x86 cores with 256 rows per query.
GATHER_COST = 4.0


def block_length(bytes_per_query: int, *, gathers: bool = False) -> int:
    """How many queries fit a block.

    Args:
      gathers: whether most of it are rows that each query gathers for itself.
    """
    most = BLOCK_BYTES if platform() == "cpu" else _ACCELERATOR_BLOCK_BYTES
    if gathers and platform() == "cpu":
        most = _GATHERED_BLOCK_BYTES
    return max(1, most // bytes_per_query)


def short_enough(length: int, num_queries: int) -> int:
    """A length of blocks of which most do not see the whole of a prompt, where that is of use."""
    if platform() != "cpu":
        return length
    return min(length, max(_SHORTEST_BLOCK, -(-num_queries // LENGTHS)))


def map_queries(function: Callable[..., Result], length: int, *queries: Any) -> Result:
    """Applies a function to blocks of queries, one after the other.

    Args:
      function: takes trees like `queries`, returns a tree; treats each query on its own.
      length: queries in a block at most; a batch with no more is passed whole.
      queries: trees of arrays with axes B, T, ...

    Returns:
      What `function(*queries)` would. Gradients recompute each block, but for what is named KEPT.
    """
    num_queries = jax.tree.leaves(queries)[0].shape[1]
    if num_queries <= length:
        return function(*queries)
    policy = jax.checkpoint_policies.save_only_these_names(KEPT)
    recomputed = jax.checkpoint(lambda block: function(*block), policy=policy)
    return joined(jax.lax.map(recomputed, split(queries, length)), num_queries)


def split(queries: Result, length: int) -> Result:
    """Blocks of a tree of arrays BT...: GBT..., of at most `length` queries, padded with zeros."""

    def parts(x: jax.Array) -> jax.Array:
        batch, num_queries = x.shape[:2]
        num_blocks = _num_blocks(num_queries, length)
        equal = -(-num_queries // num_blocks)  # equal blocks have the least padding
        x = padded_to(x, num_blocks * equal, 1)
        return jnp.moveaxis(x.reshape(batch, num_blocks, equal, *x.shape[2:]), 1, 0)

    return jax.tree.map(parts, queries)


def _num_blocks(num_queries: int, length: int) -> int:
    """The fewest, or up to a third more if these need no padding."""
    fewest = max(1, -(-num_queries // length))
    evenly = (few for few in range(fewest, fewest * 4 // 3 + 1) if num_queries % few == 0)
    return next(evenly, fewest)


def joined(blocks: Result, num_queries: int) -> Result:
    """Undoes `split`."""

    def whole(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :num_queries]

    return jax.tree.map(whole, blocks)


def lengths_in_sight(num_slots: int, least: int) -> tuple[int, ...]:
    """Of how many first slots a program has a version, from `least` on; all of them is the last.

    On a CPU, where a program may as well have a few versions of itself: reading a prompt then takes
    little more than half the work.
    """
    parts = range(1, LENGTHS) if platform() == "cpu" else ()
    lengths = [num_slots * part // LENGTHS for part in parts]
    return (*(length for length in lengths if length >= least), num_slots)


def in_sight(seen: jax.Array, lengths: Sequence[int]) -> jax.Array:
    """The version to use: the first of the lengths beyond which no query sees; `seen` is ...TS."""
    if len(lengths) == 1:
        return jnp.zeros((), jnp.int32)
    seen_S = jnp.any(seen, axis=tuple(range(seen.ndim - 1)))
    last = jnp.max(jnp.where(seen_S, jnp.arange(seen.shape[-1]), 0))
    return jnp.sum(last >= jnp.array(lengths[:-1], jnp.int32), dtype=jnp.int32)


def padded_to(x: jax.Array, size: int, axis: int = 0) -> jax.Array:
    """With zeros after what there is along an axis."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, padding)


def in_version(
    version: jax.Array, lengths: Sequence[int], among_first: Callable[[int], Result]
) -> Result:
    """What `among_first` gives for the length of a version."""
    branches = [functools.partial(among_first, length) for length in lengths]
    result: Result = jax.lax.switch(version, branches)
    return result
