"""Multi-head latent attention, over all visible tokens or over selected ones."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from glm5_jax.cache import Rows
from glm5_jax.config import Config, MlaConfig
from glm5_jax.linear import project, project_f32
from glm5_jax.norm import rms_norm
from glm5_jax.params import scale, weight
from glm5_jax.places import Places
from glm5_jax.queries import GATHER_COST, block_length, map_queries
from glm5_jax.rope import Rotation, rotate
from glm5_jax.selection import Selection


class Queries(NamedTuple):
    """The two parts of each head's query: without and with rotation."""

    nope_BTNH: jax.Array
    rope_BTNR: jax.Array


class Attended(NamedTuple):
    """What attention returns."""

    values: jax.Array  # by head: BTNV, or BTNA where values are sums of rows
    mass: jax.Array  # float32, what each key or selected token got, summed over heads


# Attends from a block of queries, given with their places and their selection.
AttendBlock = Callable[[Queries, Places, Selection], Attended]


class Attention(nnx.Module):
    """Weights of one layer's attention.

    Source: DeepSeek-V2, arXiv:2405.04434, section 2.1.
    """

    def __init__(self, config: Config):
        mla = config.mla
        heads, q_rank, kv_rank = mla.num_heads, mla.q_rank, mla.kv_rank
        self.config = mla
        self.q_down = weight("q_rank embed", q_rank, config.dim)
        self.q_norm = scale("q_rank", q_rank)
        self.q_up = weight("heads head_dim q_rank", heads, mla.nope_dim + mla.rope_dim, q_rank)
        self.kv_down = weight("kv_rank embed", mla.row_dim, config.dim)
        self.kv_norm = scale("kv_rank", kv_rank)
        self.kv_up = weight("heads head_dim kv_rank", heads, mla.nope_dim + mla.value_dim, kv_rank)
        self.out = weight("embed heads head_dim", config.dim, heads, mla.value_dim)

    def query_latent(self, x_BTD: jax.Array) -> jax.Array:
        """The normalised query latent BTQ, which also feeds the indexer."""
        latent_BTQ = project("BTD,QD->BTQ", x_BTD, self.q_down)
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
        with_mass: bool = False,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Attends to the selected tokens.

        The shapes alone decide how this is computed (`cheapest_form`), never what.

        Returns:
          BTD; and if asked for, the attention that each selected token got, summed over heads, in
          the shape of `Selection.log_share`.
        """
        batch, num_queries, num_heads, _ = queries.nope_BTNH.shape
        topk = selection.topk
        form = cheapest_form(self.config, num_queries, rows.num_slots, topk)
        if form == "gathered":
            attend_block = self._gathered(rows)
            bytes_per_query = 4 * batch * (topk or 0) * (self.config.row_dim + 2 * num_heads)
        else:
            prepare = self._expanded if form == "expanded" else self._absorbed
            attend_block = prepare(rows, key_places)
            bytes_per_query = 4 * batch * rows.num_slots * 2 * num_heads

        def attend_part(
            queries: Queries, places: Places, selection: Selection
        ) -> tuple[jax.Array, jax.Array | None]:
            values_BTNV, mass = attend_block(queries, places, selection)
            if form != "gathered" and selection.index_BTK is not None:
                mass = jnp.take_along_axis(mass, selection.index_BTK, axis=-1)
            return values_BTNV, mass if with_mass else None

        length = block_length(bytes_per_query)
        values_BTNV, mass = map_queries(attend_part, length, queries, query_places, selection)
        return project("BTNV,DNV->BTD", values_BTNV, self.out), mass

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

    def _absorbed(self, rows: Rows, key_places: Places) -> AttendBlock:
        rows_BSA = rows.all()

        def attend_block(queries: Queries, places: Places, selection: Selection) -> Attended:
            query_BTNA = self._absorb_keys(queries)
            seen_BTS = selection.seen(places, key_places)
            sums = latent_attention(query_BTNA, rows_BSA, seen_BTS, scale=self.config.score_scale)
            return self._expand_values(sums)

        return attend_block

    def _gathered(self, rows: Rows) -> AttendBlock:
        def attend_block(queries: Queries, _: Places, selection: Selection) -> Attended:
            assert selection.index_BTK is not None and selection.valid_BTK is not None
            query_BTNA = self._absorb_keys(queries)
            rows_BTKA = rows.taken(selection.index_BTK)
            valid_BTK, scale = selection.valid_BTK, self.config.score_scale
            return self._expand_values(
                gathered_attention(query_BTNA, rows_BTKA, valid_BTK, scale=scale)
            )

        return attend_block

    def _split_up(self) -> tuple[jax.Array, jax.Array]:
        """The up-projections of keys NHC and of values NVC."""
        key_up_NHC, value_up_NVC = jnp.split(self.kv_up, [self.config.nope_dim], axis=1)
        return key_up_NHC, value_up_NVC

    def _absorb_keys(self, queries: Queries) -> jax.Array:
        """Queries BTNA that meet rows directly: multiplied by the key up-projection."""
        latent_BTNC = project("BTNH,NHC->BTNC", queries.nope_BTNH, self._split_up()[0])
        return jnp.concatenate([latent_BTNC, queries.rope_BTNR], axis=-1)

    def _expand_values(self, attended: Attended) -> Attended:
        """Values of every head from sums of rows, of which only the latent part counts."""
        attended_BTNC = attended.values[..., : self.config.kv_rank]
        value_BTNV = project("BTNC,NVC->BTNV", attended_BTNC, self._split_up()[1])
        return Attended(value_BTNV, attended.mass)


def cheapest_form(
    mla: MlaConfig, num_queries: int, num_slots: int, topk: int | None
) -> Literal["expanded", "absorbed", "gathered"]:
    """Which of three equal ways to attend takes the least work, by multiply-adds per head.

    `expanded` forms every token's keys and values once and then works per head; `absorbed` moves
    the up-projections to the queries and attends to the rows themselves; `gathered` is absorbed,
    over the selected rows only.
    """
    up_projection = mla.kv_rank * (mla.nope_dim + mla.value_dim)
    per_expanded_key = mla.nope_dim + mla.rope_dim + mla.value_dim
    per_row = mla.row_dim + mla.kv_rank
    expanded = num_slots * up_projection + num_queries * num_slots * per_expanded_key
    absorbed = num_queries * up_projection + num_queries * num_slots * per_row
    if topk is not None:
        gathered = num_queries * (up_projection + topk * per_row * GATHER_COST)
        if gathered < min(expanded, absorbed):
            return "gathered"
    return "expanded" if expanded < absorbed else "absorbed"


def expanded_attention(
    query_BTNX: jax.Array,
    key_BSNX: jax.Array,
    value_BSNV: jax.Array,
    seen_BTS: jax.Array,
    *,
    scale: float,
) -> Attended:
    """Plain attention over per-head keys and values."""
    scores_BNTS = project_f32("BTNX,BSNX->BNTS", query_BTNX, key_BSNX) * scale
    probs_BNTS = _softmax(scores_BNTS, seen_BTS[:, None])
    value_BTNV = project("BNTS,BSNV->BTNV", probs_BNTS.astype(value_BSNV.dtype), value_BSNV)
    return Attended(value_BTNV, jnp.sum(probs_BNTS, axis=1))


def latent_attention(
    query_BTNA: jax.Array, rows_BSA: jax.Array, seen_BTS: jax.Array, *, scale: float
) -> Attended:
    """Attention in the latent space: all heads on one set of rows, both as keys and as values.

    Source: DeepSeek-V2, arXiv:2405.04434, section 2.1.2, on absorbing the up-projections.
    """
    scores_BNTS = project_f32("BTNA,BSA->BNTS", query_BTNA, rows_BSA) * scale
    probs_BNTS = _softmax(scores_BNTS, seen_BTS[:, None])
    sums_BTNA = project("BNTS,BSA->BTNA", probs_BNTS.astype(rows_BSA.dtype), rows_BSA)
    return Attended(sums_BTNA, jnp.sum(probs_BNTS, axis=1))


def gathered_attention(
    query_BTNA: jax.Array, rows_BTKA: jax.Array, valid_BTK: jax.Array, *, scale: float
) -> Attended:
    """`latent_attention` where every query has its own K rows; the work is O(K) per query."""
    scores_BTNK = project_f32("BTNA,BTKA->BTNK", query_BTNA, rows_BTKA) * scale
    probs_BTNK = _softmax(scores_BTNK, valid_BTK[:, :, None])
    sums_BTNA = project("BTNK,BTKA->BTNA", probs_BTNK.astype(rows_BTKA.dtype), rows_BTKA)
    return Attended(sums_BTNA, jnp.sum(probs_BTNK, axis=2))


def _softmax(scores: jax.Array, seen: jax.Array) -> jax.Array:
    """Softmax over the seen entries of the last axis.

    Hidden scores are finite: a query that sees nothing, as padding does, must not yield NaN.
    """
    hidden = jnp.finfo(scores.dtype).min
    return jax.nn.softmax(jnp.where(seen, scores, hidden), axis=-1)
