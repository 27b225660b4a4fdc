"""The tokens of highest score: chosen exactly, and no more of them looked at than need be."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from glm5_jax.collectives import MODEL, exchanged, joined, padded, platform
from glm5_jax.queries import in_sight, in_version, lengths_in_sight
from glm5_jax.topk import positions_of_highest

# What `_bound` is found by, where there are so many times more tokens than are wanted.
_HALVINGS, _MANY = 6, 4
# Queries that on a CPU are better passed over together than put on heaps one by one.
_MANY_QUERIES = 64


class Candidates(NamedTuple):
    """Tokens of highest score among some, of equals those of lowest position; in any order."""

    score_BTK: jax.Array
    index_BTK: jax.Array


def highest(score_BTS: jax.Array, most: int) -> Candidates:
    """The `most` tokens of highest score; of equals those of lowest position."""
    batch, num_queries, num_tokens = score_BTS.shape
    if platform() == "cpu" and batch * num_queries >= _MANY_QUERIES:
        index_RK = positions_of_highest(score_BTS.reshape(-1, num_tokens), most)
        index_BTK = index_RK.reshape(batch, num_queries, most)
        return Candidates(jnp.take_along_axis(score_BTS, index_BTK, axis=-1), index_BTK)
    if platform() == "cpu" and num_tokens >= _MANY * most:
        score_BTS = jnp.where(score_BTS >= _bound(score_BTS, most), score_BTS, -jnp.inf)
    return Candidates(*jax.lax.top_k(score_BTS, most))


def _bound(score_BTS: jax.Array, most: int) -> jax.Array:
    """A score that at least `most` tokens reach, and not many more; BT1.

    XLA's CPU backend (0.10) puts on a heap every token that is higher than all but `most` of those
    before it. Without those that come to nothing this takes half the time, which pays for finding
    the bound several times over.
    """
    low_BT1 = jnp.min(score_BTS, -1, keepdims=True, where=score_BTS > -jnp.inf, initial=jnp.inf)
    high_BT1 = jnp.max(score_BTS, -1, keepdims=True)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_BT1, high_BT1 = bounds
        middle_BT1 = low_BT1 / 2 + high_BT1 / 2
        above_BT1 = jnp.sum(score_BTS >= middle_BT1, -1, keepdims=True, dtype=jnp.int32)
        reached_BT1 = above_BT1 >= most
        return (
            jnp.where(reached_BT1, middle_BT1, low_BT1),
            jnp.where(reached_BT1, high_BT1, middle_BT1),
        )

    return jax.lax.fori_loop(0, _HALVINGS, halve, (low_BT1, high_BT1))[0]


def within_sight(
    seen_BTS: jax.Array, least: int, among_first: Callable[[int], Candidates]
) -> Candidates:
    """The candidates among so many first slots that no query sees any further."""
    lengths = lengths_in_sight(seen_BTS.shape[-1], least)
    return in_version(in_sight(seen_BTS, lengths), lengths, among_first)


def best_of_all_shards(found: Candidates, topk: int) -> Candidates:
    """The best of the shards' candidates; each device settles this for its share of the queries.

    Shards take turns along a sequence, so among equal scores the lowest position is sought.
    """
    batch, num_queries, _ = found.index_BTK.shape

    def assemble(part_BTK: jax.Array) -> jax.Array:
        by_query = padded(part_BTK.reshape(batch * num_queries, -1), (MODEL,), 0)
        return exchanged(by_query, (MODEL,), split=0, join=1)

    scores, positions = map(assemble, found)
    falling, positions = jax.lax.sort((-scores, positions), num_keys=2)
    chosen = (-falling[:, :topk], positions[:, :topk])
    return Candidates(
        *(
            joined(part, (MODEL,), 0, batch * num_queries).reshape(batch, num_queries, topk)
            for part in chosen
        )
    )
