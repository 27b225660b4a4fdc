"""The lightning indexer of DeepSeek sparse attention: which tokens each query attends to."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from glm5_jax.cache import Rows
from glm5_jax.candidates import Candidates, best_of_all_shards, highest, within_sight
from glm5_jax.collectives import (
    MODEL,
    alike,
    exchanged,
    gathered,
    joined,
    num_shards,
    padded,
    platform,
    share,
)
from glm5_jax.config import Config
from glm5_jax.linear import product_f32, project
from glm5_jax.norm import layer_norm
from glm5_jax.params import bias, scale, weight
from glm5_jax.places import Places, visible
from glm5_jax.queries import GATHER_COST, block_length, map_queries, short_enough
from glm5_jax.rope import Rotation, rotate
from glm5_jax.selection import Selection

_KEY_NORM_EPS = 1e-6  # of every published model; not in the config
_HIDDEN = float(jnp.finfo(jnp.float32).min)  # finite, lest a query that sees nothing yield NaN
# Up to here a product over all heads is small, and faster than reading the keys once per head.
_FEW_QUERIES = 8
# Of keys from pages at a time, on a CPU: for each row of a batch, of which two to eight count.
_GATHERED_BYTES_OF_ROW, _FEWEST_ROWS, _MOST_ROWS = 2**19, 2, 8
# Names the loop over pages in traces: how often it runs depends on how long the rows are.
PAGE_LOOP = "index_pages"


class Indexer(nnx.Module):
    """Weights of one layer's indexer. On a mesh a device has some of the query heads.

    Source: DeepSeek-V3.2, arXiv:2512.02556, section 2.1; half-size rotary part in front.
    """

    def __init__(self, config: Config):
        indexer = config.indexer
        heads, width = indexer.num_heads, indexer.head_dim
        self.config = indexer
        self.rope_dim = config.mla.rope_dim
        self.query = weight("index_heads index_dim q_rank", heads, width, config.mla.q_rank)
        self.key = weight("index_dim embed", width, config.dim)
        self.key_scale = scale("index_dim", width)
        self.key_bias = bias("index_dim", width)
        self.head_gate = weight("index_gates embed", heads, config.dim)

    def keys(self, x_BTD: jax.Array, turn: Rotation) -> jax.Array:
        """The index keys of tokens, BTJ; `x_BTD` is the layer's normalised input."""
        key_BTJ = project("BTD,JD->BTJ", x_BTD, self.key)
        normed_BTJ = layer_norm(key_BTJ, self.key_scale, self.key_bias, _KEY_NORM_EPS)
        return self._rotated(normed_BTJ, turn)

    def queries(self, latent_BTQ: jax.Array, turn: Rotation) -> jax.Array:
        """This device's heads' queries, BTIJ, from the attention's normalised query latent."""
        return self._rotated(project("BTQ,IJQ->BTIJ", latent_BTQ, self.query), turn)

    def gates(self, x_BTD: jax.Array) -> jax.Array:
        """The signed weight of each head's score, BTI in float32, both score scales included."""
        scale = self.config.num_heads**-0.5 * self.config.head_dim**-0.5
        return product_f32("BTD,ID->BTI", x_BTD, self.head_gate) * scale

    def _rotated(self, x: jax.Array, turn: Rotation) -> jax.Array:
        """Rotates the first `rope_dim` dimensions: here they come first, in MLA last."""
        rope, rest = jnp.split(x, [self.rope_dim], axis=-1)
        rope = rotate(rope, turn, interleaved=self.config.rope_interleave)
        return jnp.concatenate([rope, rest], axis=-1)

    def select(
        self,
        x_BTD: jax.Array,
        latent_BTQ: jax.Array,
        keys: Rows,
        turn: Rotation,
        query_places: Places,
        key_places: Places,
    ) -> Selection:
        """The `topk` visible tokens of highest score, per query; all where there are no more.

        On a mesh each device does this for its share of the queries, or, where the slots are
        divided, for all queries among the slots it holds; then the best of these are chosen.
        """
        slots = keys.slots
        if slots.everywhere <= self.config.topk:
            return Selection()
        # Selecting is not differentiable: the indexer learns from what it expects (`log_share`).
        x_BTD, latent_BTQ = jax.lax.stop_gradient((x_BTD, latent_BTQ))
        keys = jax.lax.stop_gradient(keys)
        most = min(self.config.topk, slots.held)
        num_pages = _pages_at_once(keys, x_BTD.shape[1])
        keys_BSJ = keys.all() if num_pages is None else None

        def propose(query_BTIJ: jax.Array, gate_BTI: jax.Array, places: Places) -> Candidates:
            seen_BTS = visible(places, key_places)

            def among_first(num_slots: int) -> Candidates:
                if keys_BSJ is not None:
                    scores_BTS = index_scores(query_BTIJ, keys_BSJ[:, :num_slots], gate_BTI)
                else:
                    end = jnp.max(places.position_BT) + 1
                    scores_BTS = _scores_by_page(query_BTIJ, keys, gate_BTI, num_pages, end)
                    scores_BTS = scores_BTS[..., :num_slots]
                masked_BTS = jnp.where(seen_BTS[..., :num_slots], scores_BTS, -jnp.inf)
                return highest(masked_BTS, most)

            return within_sight(seen_BTS, most, among_first)

        batch, num_queries, _ = x_BTD.shape
        length = block_length(bytes_per_query=3 * 4 * batch * slots.held)
        length = short_enough(length, num_queries)
        if slots.are_divided:
            query_BTIJ = gathered(self.queries(latent_BTQ, turn), (MODEL,), 2)
            found = map_queries(propose, length, query_BTIJ, self.gates(x_BTD), query_places)
            found = found._replace(index_BTK=slots.position(found.index_BTK))
            found = best_of_all_shards(found, self.config.topk)
        else:
            found = map_queries(
                propose, length, *self._shared(x_BTD, latent_BTQ, turn, query_places)
            )
            found = jax.tree.map(lambda part: joined(part, (MODEL,), 1, num_queries), found)
        return Selection(found.index_BTK, found.score_BTK > -jnp.inf)

    def _shared(
        self, x_BTD: jax.Array, latent_BTQ: jax.Array, turn: Rotation, places: Places
    ) -> tuple[jax.Array, jax.Array, Places]:
        """Queries of all heads, gates and places of this device's share of the tokens."""
        query_BTIJ = padded(self.queries(latent_BTQ, turn), (MODEL,), 1)
        gate_BTI = self.gates(share(x_BTD, (MODEL,), 1))
        part = jax.tree.map(lambda leaf_BT: share(leaf_BT, (MODEL,), 1), places)
        return exchanged(query_BTIJ, (MODEL,), split=1, join=2), gate_BTI, part

    def log_share(
        self,
        x_BTD: jax.Array,
        latent_BTQ: jax.Array,
        turn: Rotation,
        places: Places,
        selection: Selection,
    ) -> jax.Array:
        """What the indexer expects each selected token's share of attention to be.

        The one output that its gradient passes through; its inputs get none.

        Returns:
          The log-softmax of the scores over the selected tokens, as `Selection.log_share` is.
        """
        x_BTD, latent_BTQ = jax.lax.stop_gradient((x_BTD, latent_BTQ))
        keys = Rows.of(self.keys(x_BTD, turn))
        num_tokens, num_heads = keys.slots.held, self.config.num_heads
        topk = selection.topk or num_tokens
        gathers = topk * GATHER_COST < num_tokens

        def share_block(
            query_BTIJ: jax.Array, gate_BTI: jax.Array, part: Places, selection: Selection
        ) -> jax.Array:
            index_BTK, seen = selection.index_BTK, selection.valid_BTK
            if index_BTK is None or seen is None:
                scores, seen = index_scores(query_BTIJ, keys.all(), gate_BTI), visible(part, places)
            elif gathers:
                scores = taken_scores(query_BTIJ, keys.taken(index_BTK), gate_BTI)
            else:
                scores_BTS = index_scores(query_BTIJ, keys.all(), gate_BTI)
                scores = jnp.take_along_axis(scores_BTS, index_BTK, axis=-1)
            return jax.nn.log_softmax(jnp.where(seen, scores, _HIDDEN), axis=-1)

        per_query = topk * self.config.head_dim if gathers else num_tokens * num_heads
        length = block_length(bytes_per_query=2 * 4 * x_BTD.shape[0] * per_query)
        selection = jax.tree.map(lambda leaf_BTK: share(leaf_BTK, (MODEL,), 1), selection)
        queries = self._shared(x_BTD, latent_BTQ, turn, places)
        return map_queries(share_block, length, *queries, selection)


def index_scores(query_BTIJ: jax.Array, keys_BSJ: jax.Array, gate_BTI: jax.Array) -> jax.Array:
    """The score of every token for every query: `sum_i gate_i relu(query_i . key)`.

    Returns:
      BTS float32.

    Source: DeepSeek-V3.2, arXiv:2512.02556, equation 1.
    """
    if query_BTIJ.shape[1] <= _FEW_QUERIES:
        return _scores_at_once(query_BTIJ, keys_BSJ, gate_BTI)
    return _scores_by_head(query_BTIJ, keys_BSJ, gate_BTI)


def _pages_at_once(keys: Rows, num_queries: int) -> int | None:
    """How many pages of each row to score together; None for all, gathered once.

    On a CPU what is gathered for a few queries should not leave the cache before it is used: that
    takes two to four times as long at 64k tokens. Products should not be small either: eight rows
    of 16k tokens take a fifth longer with a quarter as much at a time.
    """
    if keys.page_BW is None or num_queries > _FEW_QUERIES or platform() != "cpu":
        return None
    page_bytes = math.prod(keys.stack_LYUA.shape[2:]) * keys.dtype.itemsize
    batch, width = keys.page_BW.shape
    return pages_of_block(batch, width, page_bytes)


def pages_of_block(batch: int, width: int, page_bytes: int) -> int:
    """How many of `width` pages of each row are scored at a time on a CPU."""
    rows = min(max(batch, _FEWEST_ROWS), _MOST_ROWS)
    most = max(1, rows * _GATHERED_BYTES_OF_ROW // (batch * page_bytes))
    return math.gcd(width, 1 << (most.bit_length() - 1))


def _scores_by_page(
    query_BTIJ: jax.Array, keys: Rows, gate_BTI: jax.Array, num_pages: int | None, end: jax.Array
) -> jax.Array:
    """`index_scores` of the slots before a position; others get 0."""
    assert keys.page_BW is not None and num_pages is not None
    page_BW, slots = keys.page_BW, keys.slots
    block = num_pages * slots.page_part

    def score_block(number: jax.Array, scores_BTS: jax.Array) -> jax.Array:
        pages = jax.lax.dynamic_slice_in_dim(page_BW, number * num_pages, num_pages, 1)
        keys_BSJ = dataclasses.replace(keys, page_BW=pages).all()
        part_BTS = index_scores(query_BTIJ, keys_BSJ, gate_BTI)
        return jax.lax.dynamic_update_slice_in_dim(scores_BTS, part_BTS, number * block, 2)

    nothing_BTS = jnp.zeros((*gate_BTI.shape[:2], slots.held), jnp.float32)
    nothing_BTS = alike(nothing_BTS, query_BTIJ, gate_BTI, keys)[0]
    num_blocks = -(-end // (block * num_shards(keys.axes)))
    with jax.named_scope(PAGE_LOOP):
        return jax.lax.fori_loop(0, num_blocks, score_block, nothing_BTS)


def _scores_at_once(query_BTIJ: jax.Array, keys_BSJ: jax.Array, gate_BTI: jax.Array) -> jax.Array:
    """Reads the keys once, in the order they lie: an einsum would have them transposed on CPU."""
    batch, num_queries, heads, width = query_BTIJ.shape
    query_BMJ = query_BTIJ.reshape(batch, num_queries * heads, width)
    head_BSM = jax.nn.relu(_exact_dot(keys_BSJ, query_BMJ))
    head_BSTI = head_BSM.reshape(batch, -1, num_queries, heads)
    return jnp.einsum("BSTI,BTI->BTS", head_BSTI, gate_BTI, precision=jax.lax.Precision.HIGHEST)


def _scores_by_head(query_BTIJ: jax.Array, keys_BSJ: jax.Array, gate_BTI: jax.Array) -> jax.Array:
    """Adds head to head, so that no [heads, queries, tokens] array exists."""

    def add_head(
        scores_BTS: jax.Array, head: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
        query_BTJ, gate_BT = head
        return scores_BTS + gate_BT[..., None] * jax.nn.relu(_exact_dot(query_BTJ, keys_BSJ)), None

    batch, num_queries, _ = gate_BTI.shape
    nothing_BTS = jnp.zeros((batch, num_queries, keys_BSJ.shape[1]), jnp.float32)
    by_head = (jnp.moveaxis(query_BTIJ, 2, 0), jnp.moveaxis(gate_BTI, 2, 0))
    nothing_BTS, by_head, keys_BSJ = alike(nothing_BTS, by_head, keys_BSJ)
    return jax.lax.scan(add_head, nothing_BTS, by_head)[0]


def taken_scores(query_BTIJ: jax.Array, keys_BTKJ: jax.Array, gate_BTI: jax.Array) -> jax.Array:
    """`index_scores` where every query has keys of its own, BTK."""
    head_BTIK = jax.nn.relu(product_f32("BTIJ,BTKJ->BTIK", query_BTIJ, keys_BTKJ))
    return product_f32("BTIK,BTI->BTK", head_BTIK, gate_BTI)


def _exact_dot(left: jax.Array, right: jax.Array) -> jax.Array:
    """[B, X, J] and [B, Y, J] to [B, X, Y], no operand rounded: bfloat16 ones need not be."""
    return jax.lax.dot_general(
        left,
        right,
        (((2,), (2,)), ((0,), (0,))),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
