"""Drafting tokens with the MTP layer, for the model to verify in one step."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from glm5_jax.cache import KVCache
from glm5_jax.collectives import alike
from glm5_jax.inference.sampling import Seen
from glm5_jax.model import Glm5, read_ahead
from glm5_jax.places import Places
from glm5_jax.selection import Selection
from glm5_jax.sharding import Rules

if TYPE_CHECKING:
    from glm5_jax.inference.steps import Turn

# Draws a token of each row from a hidden state, given what was seen and its number in the text.
Draw = Callable[[jax.Array, Seen, jax.Array], jax.Array]


def propose(
    model: Glm5,
    before_BTD: jax.Array,
    turn: "Turn",
    cache: KVCache,
    seen: Seen,
    num_drafts: int,
    draw: Draw,
    rules: Rules,
) -> tuple[jax.Array, KVCache]:
    """Drafts the tokens after the one that the model is to read next.

    First the MTP layer reads the tokens that were settled since, each with the model's own hidden
    state, which replaces what it read of drafts. Then it goes on from its own drafts and hidden
    states, one token at a time.

    Args:
      before_BTD: the hidden state of the token before each fresh one.
      cache: whose length is the position of the last fresh token.

    Returns:
      The drafts, BN, and the cache.
    """
    index_T = jnp.arange(turn.token_BT.shape[1], dtype=jnp.int32)
    num_fresh_B1 = jnp.asarray(turn.num_fresh_B)[:, None]
    length_B1 = cache.length_B[:, None]
    active_B1 = jnp.asarray(turn.active_B)[:, None]
    is_fresh_BT = (index_T < num_fresh_B1) & active_B1
    places = Places(length_B1 - num_fresh_B1 + 1 + index_T, is_fresh_BT.astype(jnp.int32))
    hidden_BTD, cache, selection = read_ahead(
        model, before_BTD, turn.token_BT, places, cache, rules=rules
    )
    last_B = turn.num_fresh_B - 1
    hidden_B1D = row_of(hidden_BTD, last_B)
    selection = jax.tree.map(lambda each_BTK: row_of(each_BTK, last_B), selection)
    token_B = draw(hidden_B1D, seen, turn.count_B)

    def go_on(carry: Any, distance: jax.Array) -> tuple[Any, jax.Array]:
        hidden_B1D, token_B, seen, cache = carry
        seen = seen.having(token_B, turn.active_B)
        places = Places(length_B1 + distance, active_B1.astype(jnp.int32))
        chosen = None
        if model.config.mtp_shares_selection:
            chosen = _with_drafts(selection, cache.length_B, distance, num_drafts - 1)
        hidden_B1D, cache, _ = read_ahead(
            model, hidden_B1D, token_B[:, None], places, cache, chosen, rules=rules
        )
        token_B = draw(hidden_B1D, seen, turn.count_B + distance)
        return (hidden_B1D, token_B, seen, cache), token_B

    (seen,) = alike(seen, token_B)[:1]
    start = (hidden_B1D, token_B, seen, cache)
    (_, _, _, cache), later_NB = jax.lax.scan(go_on, start, jnp.arange(1, num_drafts))
    return jnp.concatenate([token_B[:, None], later_NB.T], axis=1), cache


def row_of(x: jax.Array, index_B: jax.Array) -> jax.Array:
    """One query of each row, by its index: B1 and the other axes; the first for an index of -1."""
    index = jnp.maximum(index_B, 0).reshape(-1, *[1] * (x.ndim - 1))
    return jnp.take_along_axis(x, index, axis=1)


def _with_drafts(
    selection: Selection, length_B: jax.Array, distance: jax.Array, num_drafts: int
) -> Selection:
    """The selection of the last token that was not drafted, and the drafts since.

    They come after all that it chose from, and an indexer would not be asked about them.
    """
    if selection.index_BTK is None or selection.valid_BTK is None:
        return selection
    ahead_N = jnp.arange(1, num_drafts + 1)
    draft_B1N = (length_B[:, None] + ahead_N)[:, None]
    valid_B1N = jnp.broadcast_to(ahead_N <= distance, draft_B1N.shape)
    return Selection(
        jnp.concatenate([selection.index_BTK, draft_B1N], axis=-1),
        jnp.concatenate([selection.valid_BTK, valid_B1N], axis=-1),
    )
