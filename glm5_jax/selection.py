"""The tokens that each query attends to: what indexers hand to attention, layer to layer."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from glm5_jax.collectives import MESH_AXES, MODEL, share_length, spread
from glm5_jax.places import Places, visible
from glm5_jax.slots import Slots


class Selection(NamedTuple):
    """Computed by a full layer, used by the shared layers after it too.

    Exact and deterministic: the K highest scores, the lowest position first among equal ones.
    Without an index every visible token is selected, as it is where there are no more than K slots.
    """

    index_BTK: jax.Array | None = None  # int32 positions
    valid_BTK: jax.Array | None = None  # False where a query sees fewer than K tokens
    # The logarithm of the share of attention that the indexer expects each selected token to get:
    # BTK, or BTS without an index; on a mesh, for this device's share of the queries along `model`.
    # Only where the indexer is to learn.
    log_share: jax.Array | None = None

    @classmethod
    def nothing(
        cls, batch: int, length: int, num_slots: int, topk: int, *, with_share: bool
    ) -> "Selection":
        """A selection of no token, such as one of that many slots would be."""
        nothing = cls()
        if num_slots > topk:
            shape = (batch, length, topk)
            nothing = cls(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool))
        if with_share:
            shape = (batch, share_length(length, (MODEL,)), min(num_slots, topk))
            nothing = nothing._replace(log_share=jnp.zeros(shape, jnp.float32))
        return spread(nothing, MESH_AXES)

    @property
    def topk(self) -> int | None:
        """K, or None where every visible token is selected."""
        return None if self.index_BTK is None else self.index_BTK.shape[-1]

    def held(self, slots: Slots) -> "Selection":
        """The part that is held here, by slot."""
        if self.index_BTK is None or self.valid_BTK is None:
            return self
        slot_BTK = slots.slot(self.index_BTK)
        return Selection(slot_BTK, self.valid_BTK & (slot_BTK < slots.held))

    def seen(self, queries: Places, keys: Places) -> jax.Array:
        """Which keys each query attends to, BTS bool. An index holds visible tokens only."""
        if self.index_BTK is None:
            return visible(queries, keys)
        batch, length, _ = self.index_BTK.shape
        batch_B11 = jnp.arange(batch)[:, None, None]
        query_T1 = jnp.arange(length)[:, None]
        nothing_BTS = jnp.zeros((batch, length, keys.position_BT.shape[1]), bool)
        # Not `set`: what is not valid may name the slot of what is.
        return nothing_BTS.at[batch_B11, query_T1, self.index_BTK].max(self.valid_BTK, mode="drop")


class Recall(NamedTuple):
    """How much of the attention to all visible tokens the selected ones get.

    Of queries that see more tokens than are selected; of others they are all that is visible.
    """

    share: jax.Array  # float32, the mean over heads, summed over the queries
    num_queries: jax.Array  # int32

    @classmethod
    def of(cls, share_BTK: jax.Array, counted_BT: jax.Array) -> "Recall":
        """From what each selected token gets, and which queries count."""
        share_BT = jnp.where(counted_BT, jnp.sum(share_BTK, axis=-1), 0)
        return cls(jnp.sum(share_BT), jnp.sum(counted_BT, dtype=jnp.int32))


def divergence(mass: jax.Array, selection: Selection, counted_BT: jax.Array) -> jax.Array:
    """How far the indexer's expectation is from the attention that was paid.

    Args:
      mass: the attention that each selected token got, summed over heads; as `log_share`.
      counted_BT: which queries are summed over.

    Returns:
      The sum over the counted queries of the Kullback-Leibler divergence, in nats. The attention
      itself gets no gradient from it.

    Source: DeepSeek-V3.2, arXiv:2512.02556, equations 3 and 4.
    """
    assert selection.log_share is not None
    log_share, mass = selection.log_share, jax.lax.stop_gradient(mass)
    paid = jnp.sum(mass, axis=-1, keepdims=True)
    share = mass / jnp.where(paid > 0, paid, 1)  # a query that sees nothing, as padding, pays none
    gap = log_share - jnp.log(jnp.where(share > 0, share, 1))
    # Both shares sum to 1, so that their difference may be added: each term is then of the second
    # order in the gap, and what rounding does to the gap is too.
    near = (share > 0) & (gap < 1)
    near_more = share * jnp.expm1(jnp.where(near, gap, 0))
    more = jnp.where(near, near_more, jnp.exp(log_share) - share)
    return jnp.sum(jnp.where(counted_BT, jnp.sum(more - share * gap, axis=-1), 0))
