"""Attention over per-head keys and values one head at a time: what is fastest on a CPU.

A head's scores fit the caches, its products are of plain matrices, which XLA's CPU backend (0.10)
neither copies nor transposes, and tokens after the last visible one are left out. The gradient
forms the scores again from the softmax's denominator.

Source: FlashAttention, arXiv:2205.14135, section 3 and appendix B, without its tiles.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from glm5_jax.collectives import alike
from glm5_jax.linear import project, project_f32
from glm5_jax.queries import KEPT, in_sight, in_version, lengths_in_sight, padded_to

# Fewer tokens than this are not worth a version of their own.
_FEWEST_KEYS = 256


def attention_by_head(
    query_BTNX: jax.Array,
    key_BSNX: jax.Array,
    value_BSNV: jax.Array,
    seen_BTS: jax.Array,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Softmax attention, accumulated in float32.

    Returns:
      The values BTNV; the attention that each key got, summed over heads, BTS float32, which no
      gradient passes through; and the logarithm of the softmax's denominator, BTN float32.
    """
    num_slots, dtype = seen_BTS.shape[-1], value_BSNV.dtype
    lengths = lengths_in_sight(num_slots, _FEWEST_KEYS)
    query_BTNX, key_BSNX, value_BSNV, seen_BTS = alike(query_BTNX, key_BSNX, value_BSNV, seen_BTS)

    def attend(one: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
        query_TNX, key_SNX, value_SNV, seen_TS = one
        version = in_sight(seen_TS, lengths)
        by_head = [jnp.swapaxes(x, 0, 1) for x in (query_TNX, key_SNX, value_SNV)]

        def head(mass_TS: jax.Array, arrays: list[jax.Array]) -> tuple[jax.Array, Any]:
            value_TV, share_TS, log_total_T = _head(lengths, scale, *arrays, seen_TS, version)
            return mass_TS + jax.lax.stop_gradient(share_TS), (value_TV, log_total_T)

        (nothing_TS, _) = alike(jnp.zeros(seen_TS.shape, jnp.float32), seen_TS)
        mass_TS, (value_NTV, log_total_NT) = jax.lax.scan(head, nothing_TS, by_head)
        return jnp.swapaxes(value_NTV, 0, 1).astype(dtype), mass_TS, log_total_NT.T

    return jax.lax.map(attend, (query_BTNX, key_BSNX, value_BSNV, seen_BTS))


def _scores(query_TX: jax.Array, key_SX: jax.Array, seen_TS: jax.Array, scale: float) -> jax.Array:
    """Hidden ones are finite: a query that sees nothing, as padding does, is to get zeros."""
    scores_TS = project_f32("TX,SX->TS", query_TX, key_SX) * scale
    return jnp.where(seen_TS, scores_TS, jnp.finfo(scores_TS.dtype).min)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _head(lengths: tuple[int, ...], scale: float, *operands: jax.Array) -> tuple[jax.Array, ...]:
    return _head_forward(lengths, scale, *operands)[0]


def _head_forward(
    lengths: tuple[int, ...],
    scale: float,
    query_TX: jax.Array,
    key_SX: jax.Array,
    value_SV: jax.Array,
    seen_TS: jax.Array,
    version: jax.Array,
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    def among_first(num_keys: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        seen_TK, value_KV = seen_TS[:, :num_keys], value_SV[:num_keys]
        scores_TK = _scores(query_TX, key_SX[:num_keys], seen_TK, scale)
        most_T1 = jnp.max(scores_TK, axis=-1, keepdims=True)
        part_TK = jnp.where(seen_TK, jnp.exp(scores_TK - most_T1), 0)
        total_T1 = jnp.maximum(jnp.sum(part_TK, axis=-1, keepdims=True), 1)
        value_TV = project_f32("TK,KV->TV", part_TK.astype(value_KV.dtype), value_KV) / total_T1
        share_TS = padded_to(part_TK / total_T1, seen_TS.shape[1], 1)
        return value_TV, share_TS, (most_T1 + jnp.log(total_T1))[:, 0]

    value_TV, share_TS, log_total_T = in_version(version, lengths, among_first)
    value_TV, log_total_T = checkpoint_name((value_TV, log_total_T), KEPT)
    saved = (query_TX, key_SX, value_SV, seen_TS, version, value_TV, log_total_T)
    return (value_TV, share_TS, log_total_T), saved


def _head_backward(
    lengths: tuple[int, ...],
    scale: float,
    saved: tuple[jax.Array, ...],
    gradients: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array | None, ...]:
    query_TX, key_SX, value_SV, seen_TS, version, value_TV, log_total_T = saved
    by_value_TV, _, by_log_total_T = gradients
    own_T = by_log_total_T - jnp.sum(by_value_TV * value_TV, axis=-1)
    by_value_TV = by_value_TV.astype(value_SV.dtype)

    def among_first(num_keys: int) -> tuple[jax.Array, ...]:
        key_KX, value_KV = key_SX[:num_keys], value_SV[:num_keys]
        seen_TK = seen_TS[:, :num_keys]
        scores_TK = _scores(query_TX, key_KX, seen_TK, scale)
        share_TK = jnp.where(seen_TK, jnp.exp(scores_TK - log_total_T[:, None]), 0)
        by_share_TK = project_f32("TV,KV->TK", by_value_TV, value_KV)
        by_score_TK = share_TK * (by_share_TK + own_T[:, None]) * scale
        by_score_TK = by_score_TK.astype(key_SX.dtype)
        by_key_XK = project("TX,TK->XK", query_TX, by_score_TK)
        by_value_VK = project("TV,TK->VK", by_value_TV, share_TK.astype(value_SV.dtype))
        # Nobody sees past the barrier that they are to be transposed: XLA's CPU backend (0.10)
        # would rather transpose the larger operand, and be half as fast.
        by_key_XK, by_value_VK = jax.lax.optimization_barrier((by_key_XK, by_value_VK))
        return (
            project("TK,KX->TX", by_score_TK, key_KX),
            padded_to(by_key_XK.T, len(key_SX), 0),
            padded_to(by_value_VK.T, len(value_SV), 0),
        )

    return (*in_version(version, lengths, among_first), None, None)


_head.defvjp(_head_forward, _head_backward)
