"""Multi-head latent attention, over all visible tokens or over selected ones."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from glm5_jax.by_head import attention_by_head
from glm5_jax.cache import Rows
from glm5_jax.collectives import (
    MODEL,
    Axes,
    gathered,
    largest,
    num_shards,
    padded,
    platform,
    total,
    total_share,
)
from glm5_jax.config import Config, MlaConfig
from glm5_jax.gathered import gathered_attention
from glm5_jax.held import Attended, block_of_held, in_blocks
from glm5_jax.linear import project, project_f32
from glm5_jax.norm import rms_norm
from glm5_jax.params import scale, weight
from glm5_jax.places import Places
from glm5_jax.queries import GATHER_COST, block_length, map_queries, short_enough
from glm5_jax.rope import Rotation, rotate
from glm5_jax.selection import Selection
from glm5_jax.softmax import softmax_of_seen


class Queries(NamedTuple):
    """The two parts of each head's query: without and with rotation."""

    nope_BTNH: jax.Array
    rope_BTNR: jax.Array


# Attends from a block of queries, `Queries` or absorbed ones, given with places and selection.
AttendBlock = Callable[[Any, Places, Selection], Attended]
Form = Literal["expanded", "absorbed", "gathered"]


class Attention(nnx.Module):
    """Weights of one layer's attention. On a mesh a device has some of the heads.

    Source: DeepSeek-V2, arXiv:2405.04434, section 2.1.
    """

    def __init__(self, config: Config):
        mla = config.mla
        heads, q_rank, kv_rank = mla.num_heads, mla.q_rank, mla.kv_rank
        self.config = mla
        self.q_down = weight("q_latent embed", q_rank, config.dim)
        self.q_norm = scale("norm", q_rank)
        self.q_up = weight("heads head_dim q_rank", heads, mla.nope_dim + mla.rope_dim, q_rank)
        self.kv_down = weight("kv_row embed", mla.row_dim, config.dim)
        self.kv_norm = scale("norm", kv_rank)
        self.kv_up = weight("heads head_dim kv_rank", heads, mla.nope_dim + mla.value_dim, kv_rank)
        self.out = weight("embed heads head_dim", config.dim, heads, mla.value_dim)

    def query_latent(self, x_BTD: jax.Array) -> jax.Array:
        """The normalised query latent BTQ, which also feeds the indexer."""
        latent_BTQ = gathered(project("BTD,QD->BTQ", x_BTD, self.q_down), (MODEL,), dim=2)
        return rms_norm(latent_BTQ, self.q_norm, self.config.norm_eps)

    def queries(self, latent_BTQ: jax.Array, turn: Rotation) -> Queries:
        """Every head's query."""
        query_BTNX = project("BTQ,NXQ->BTNX", latent_BTQ, self.q_up)
        nope_BTNH, rope_BTNR = jnp.split(query_BTNX, [self.config.nope_dim], axis=-1)
        return Queries(nope_BTNH, rotate(rope_BTNR, turn, interleaved=True))

    def rows(self, x_BTD: jax.Array, turn: Rotation) -> jax.Array:
        """What is remembered of each token, BTA: its normalised latent, then its rotated key."""
        row_BTA = project("BTD,AD->BTA", x_BTD, self.kv_down)
        latent_BTC, key_BTR = jnp.split(row_BTA, [self.config.kv_rank], axis=-1)
        latent_BTC = rms_norm(latent_BTC, self.kv_norm, self.config.norm_eps)
        return jnp.concatenate([latent_BTC, rotate(key_BTR, turn, interleaved=True)], axis=-1)

    def attend(
        self,
        queries: Queries,
        rows: Rows,
        query_places: Places,
        key_places: Places,
        selection: Selection,
        *,
        to_all: bool = False,
        with_mass: bool = False,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Attends to the selected tokens.

        The shapes alone decide how this is computed (`cheapest_form`), never what. Where the slots
        are divided, each device attends with all heads to the selected tokens it holds.

        Args:
          to_all: whether to attend to all visible tokens instead; mass is still of those selected.

        Returns:
          BTD, of this device's heads; and if asked for, the attention that each selected token got,
          summed over all heads, in the shape of `Selection.log_share`.
        """
        batch, num_queries, num_heads, _ = queries.nope_BTNH.shape
        slots, mass = rows.slots, None
        divided, shards = slots.are_divided, num_shards(slots.axes)
        topk = None if to_all else selection.topk
        form = cheapest_form(self.config, num_queries, slots.held, topk, shards)
        if form == "expanded":
            attend_block = self._expanded(rows, key_places)
            asked: Any = queries
        else:
            attend_block = self._in_latent_space(rows, key_places, form, with_mass)
            asked = self._absorb_keys(queries)
        if divided:
            num_heads = self.config.num_heads
            asked = jax.tree.map(lambda part: gathered(part, rows.axes, dim=2), asked)
            selection = selection.held(slots)

        def attend_part(asked: Any, places: Places, selection: Selection) -> Attended:
            attended_to = Selection() if to_all else selection
            values, mass, log_total_BTN = attend_block(asked, places, attended_to)
            if form != "gathered" and selection.index_BTK is not None:
                mass = jnp.take_along_axis(mass, selection.index_BTK, axis=-1)
            return Attended(values, mass if with_mass else None, log_total_BTN)

        num_keys, per_key = slots.held, 2 * num_heads
        if form == "gathered" and topk is not None:
            num_keys = topk if with_mass else block_of_held(topk, shards)
            per_key = self.config.row_dim + 2 * num_heads
        elif form == "expanded" and platform() == "cpu":
            per_key = 4  # heads take turns
        length = block_length(4 * batch * num_keys * per_key, gathers=form == "gathered")
        if form == "expanded":
            length = short_enough(length, num_queries)
        chosen = selection._replace(log_share=None)  # a share of the queries only, and not needed
        attended = map_queries(attend_part, length, asked, query_places, chosen)
        if attended.mass is not None:
            mass = total_share(padded(attended.mass, (MODEL,), 1), (MODEL,), 1)
        values = merged(attended, rows.axes) if divided else attended.values
        if form != "expanded":
            values = project("BTNC,NVC->BTNV", values, self._split_up()[1])
        return project("BTNV,DNV->BTD", values, self.out), mass

    def _expanded(self, rows: Rows, key_places: Places) -> AttendBlock:
        latent_BSC, key_BSR = jnp.split(rows.all(), [self.config.kv_rank], axis=-1)
        key_up_NHC, value_up_NVC = self._split_up()
        key_BSNH = project("BSC,NHC->BSNH", latent_BSC, key_up_NHC)
        value_BSNV = project("BSC,NVC->BSNV", latent_BSC, value_up_NVC)
        rope_BSNR = jnp.broadcast_to(key_BSR[:, :, None], (*key_BSNH.shape[:3], key_BSR.shape[-1]))
        key_BSNX = jnp.concatenate([key_BSNH, rope_BSNR], axis=-1)

        def attend_block(queries: Queries, places: Places, selection: Selection) -> Attended:
            query_BTNX = jnp.concatenate(queries, axis=-1)
            seen_BTS = selection.seen(places, key_places)
            scale = self.config.score_scale
            return expanded_attention(query_BTNX, key_BSNX, value_BSNV, seen_BTS, scale=scale)

        return attend_block

    def _in_latent_space(
        self, rows: Rows, key_places: Places, form: Form, with_mass: bool
    ) -> AttendBlock:
        """Attends with absorbed queries; of the sums of rows only the latent part counts."""

        def attend_block(query_BTNA: jax.Array, places: Places, selection: Selection) -> Attended:
            scale = self.config.score_scale
            if form == "gathered":
                assert selection.index_BTK is not None and selection.valid_BTK is not None
                chosen = (selection.index_BTK, selection.valid_BTK)

                def attend_to(slot_BTM: jax.Array, valid_BTM: jax.Array) -> Attended:
                    rows_BTMA = rows.taken(slot_BTM)
                    return gathered_attention(query_BTNA, rows_BTMA, valid_BTM, scale=scale)

                if rows.slots.are_divided and not with_mass:
                    block = block_of_held(chosen[0].shape[-1], num_shards(rows.axes))
                    attended = in_blocks(attend_to, query_BTNA, *chosen, block)
                else:
                    attended = attend_to(*chosen)
            else:
                seen_BTS = selection.seen(places, key_places)
                attended = latent_attention(query_BTNA, rows.all(), seen_BTS, scale=scale)
            return attended._replace(values=attended.values[..., : self.config.kv_rank])

        return attend_block

    def _split_up(self) -> tuple[jax.Array, jax.Array]:
        """The up-projections of keys NHC and of values NVC."""
        key_up_NHC, value_up_NVC = jnp.split(self.kv_up, [self.config.nope_dim], axis=1)
        return key_up_NHC, value_up_NVC

    def _absorb_keys(self, queries: Queries) -> jax.Array:
        """Queries BTNA that meet rows directly: multiplied by the key up-projection."""
        latent_BTNC = project("BTNH,NHC->BTNC", queries.nope_BTNH, self._split_up()[0])
        return jnp.concatenate([latent_BTNC, queries.rope_BTNR], axis=-1)


def cheapest_form(
    mla: MlaConfig, num_queries: int, num_slots: int, topk: int | None, shards: int = 1
) -> Form:
    """Which of three equal ways to attend takes the least work, by multiply-adds per head.

    `expanded` forms every token's keys and values once and then works per head; `absorbed` moves
    the up-projections to the queries and attends to the rows themselves; `gathered` is absorbed,
    over the selected rows only, of which a shard gathers those it holds. Divided rows are never
    expanded: a device has the weights of some heads and the rows of some tokens.

    Args:
      num_slots: that are held here.
      shards: that rows are divided over.
    """
    up_projection = mla.kv_rank * (mla.nope_dim + mla.value_dim)
    per_expanded_key = mla.nope_dim + mla.rope_dim + mla.value_dim
    per_row = mla.row_dim + mla.kv_rank
    expanded = num_slots * up_projection + num_queries * num_slots * per_expanded_key
    absorbed = num_queries * up_projection + num_queries * num_slots * per_row
    if topk is not None:
        num_gathered = block_of_held(topk, shards)
        by_gathering = num_queries * (up_projection + num_gathered * per_row * GATHER_COST)
        if by_gathering < (absorbed if shards > 1 else min(expanded, absorbed)):
            return "gathered"
    return "expanded" if expanded < absorbed and shards == 1 else "absorbed"


def expanded_attention(
    query_BTNX: jax.Array,
    key_BSNX: jax.Array,
    value_BSNV: jax.Array,
    seen_BTS: jax.Array,
    *,
    scale: float,
) -> Attended:
    """Plain attention over per-head keys and values."""
    if platform() == "cpu":
        arrays = (query_BTNX, key_BSNX, value_BSNV, seen_BTS)
        return Attended(*attention_by_head(*arrays, scale=scale))
    scores_BNTS = project_f32("BTNX,BSNX->BNTS", query_BTNX, key_BSNX) * scale
    probs_BNTS, log_total_BNT = softmax_of_seen(scores_BNTS, seen_BTS[:, None])
    value_BTNV = project("BNTS,BSNV->BTNV", probs_BNTS.astype(value_BSNV.dtype), value_BSNV)
    return Attended(value_BTNV, jnp.sum(probs_BNTS, axis=1), jnp.swapaxes(log_total_BNT, 1, 2))


def latent_attention(
    query_BTNA: jax.Array, rows_BSA: jax.Array, seen_BTS: jax.Array, *, scale: float
) -> Attended:
    """Attention in the latent space: all heads on one set of rows, both as keys and as values.

    Source: DeepSeek-V2, arXiv:2405.04434, section 2.1.2, on absorbing the up-projections.
    """
    scores_BNTS = project_f32("BTNA,BSA->BNTS", query_BTNA, rows_BSA) * scale
    probs_BNTS, log_total_BNT = softmax_of_seen(scores_BNTS, seen_BTS[:, None])
    sums_BTNA = project("BNTS,BSA->BTNA", probs_BNTS.astype(rows_BSA.dtype), rows_BSA)
    return Attended(sums_BTNA, jnp.sum(probs_BNTS, axis=1), jnp.swapaxes(log_total_BNT, 1, 2))


def merged(attended: Attended, axes: Axes) -> jax.Array:
    """Attention over all tokens, from what shards with all heads paid to the tokens they hold.

    Returns:
      The values of this device's share of the heads.
    """
    log_total_BTN = attended.log_total_BTN
    part_BTN = jnp.exp(log_total_BTN - largest(log_total_BTN, axes))
    weight_BTN = part_BTN / total(part_BTN, axes)
    weighted = attended.values * weight_BTN[..., None].astype(attended.values.dtype)
    return total_share(weighted, axes, dim=2)
