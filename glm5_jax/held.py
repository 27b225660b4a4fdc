"""Attention to selected tokens where other devices hold most of them.

Each device has every query's whole selection, of which an equal share or so is in its own slots.
Those come first, and no more blocks of them are gathered than the query with the most needs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from glm5_jax.collectives import alike

# Names the loop over blocks in traces: how often it runs depends on which tokens are selected.
HELD_LOOP = "held_blocks"
_SMALLEST_BLOCK = 128


class Attended(NamedTuple):
    """What attention returns."""

    values: jax.Array  # by head: BTNV, or BTNA or BTNC where they are sums of rows
    # float32, what each key or selected token got, summed over heads; None if not asked for
    mass: Any
    # float32, the logarithm of the softmax's denominator: by it partial results are merged.
    log_total_BTN: jax.Array


def block_of_held(topk: int, num_shards: int) -> int:
    """Of how many selected tokens rows are gathered at once: twice an equal share of them.

    Every page is divided among all shards, so that a selection is spread nearly evenly over them.
    """
    return min(topk, max(_SMALLEST_BLOCK, 2 * -(-topk // num_shards)))


def in_blocks(
    attend: Callable[[jax.Array, jax.Array], Attended],
    query_BTNA: jax.Array,
    slot_BTK: jax.Array,
    held_BTK: jax.Array,
    block: int,
) -> Attended:
    """Attends to the selected tokens that are held, a block of each query's at a time.

    Args:
      attend: from the queries to so many slots BTM of each, of which some count, BTM bool.

    Returns:
      As `attend` to all of them at once; where none is held, some values with a denominator next to
      nothing, which `merged` drops. Not differentiable.
    """
    count_BT1 = jnp.sum(held_BTK, axis=-1, keepdims=True, dtype=jnp.int32)
    _, slot_BTK = jax.lax.sort((~held_BTK, slot_BTK), num_keys=1)  # the held ones first
    slot_BTK = jnp.pad(slot_BTK, [(0, 0), (0, 0), (0, -slot_BTK.shape[-1] % block)])

    def part(start: jax.Array) -> Attended:
        slot_BTM = jax.lax.dynamic_slice_in_dim(slot_BTK, start, block, axis=2)
        return attend(slot_BTM, start + jnp.arange(block) < count_BT1)

    def add(number: jax.Array, sums: Attended) -> Attended:
        return _together(sums, part(number * block))

    least = jnp.full(query_BTNA.shape[:-1], jnp.finfo(jnp.float32).min)
    nothing = Attended(jnp.zeros_like(query_BTNA, jnp.float32), None, least)
    nothing, _ = alike(nothing, (query_BTNA, slot_BTK))
    num_blocks = -(-jnp.max(count_BT1) // block)
    with jax.named_scope(HELD_LOOP):
        sums: Attended = jax.lax.fori_loop(0, num_blocks, add, nothing)
    return sums._replace(values=sums.values.astype(query_BTNA.dtype))


def _together(one: Attended, other: Attended) -> Attended:
    log_total_BTN = jnp.logaddexp(one.log_total_BTN, other.log_total_BTN)

    def weighted(sums: Attended) -> jax.Array:
        share_BTN1 = jnp.exp(sums.log_total_BTN - log_total_BTN)[..., None]
        return sums.values.astype(jnp.float32) * share_BTN1

    return Attended(weighted(one) + weighted(other), None, log_total_BTN)
