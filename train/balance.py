"""How unevenly sequences choose experts, as a loss."""

import jax
import jax.numpy as jnp

from glm5_jax.moe import Routing


def imbalance(routing: Routing, segment_BT: jax.Array, counted_BT: jax.Array) -> jax.Array:
    """How unevenly the tokens of each sequence choose experts, summed over the counted tokens.

    For a sequence of N counted tokens it is `sum_e f_e P_e`, where `f_e` is how often an expert was
    chosen over how often it would be if all were alike, and `P_e` the mean of its score over the
    sum of all scores: 1 where these are even. The gradient goes through the scores.

    Returns:
      The sum over this device's sequences of N times that.

    Source: DeepSeek-V3, arXiv:2412.19437, equations 17 to 20, of one sequence in its own right
    however sequences are packed.
    """
    batch, length, num_experts = routing.score_BTE.shape
    chosen = routing.expert_BTK.shape[-1]
    share_BTE = routing.score_BTE / jnp.sum(routing.score_BTE, axis=-1, keepdims=True)
    counted_BT1 = counted_BT[..., None].astype(jnp.float32)
    row_B1 = jnp.arange(batch)[:, None]
    # Sequences are numbered from 1 in every row, so that there are at most as many as tokens.
    nothing_BSE = jnp.zeros((batch, length + 1, num_experts), jnp.float32)
    share_BSE = nothing_BSE.at[row_B1, segment_BT].add(share_BTE * counted_BT1)
    times_BSE = nothing_BSE.at[row_B1[..., None], segment_BT[..., None], routing.expert_BTK].add(
        jnp.broadcast_to(counted_BT1, routing.expert_BTK.shape)
    )
    num_BS1 = jnp.sum(times_BSE, axis=-1, keepdims=True) / chosen
    return jnp.sum(times_BSE * share_BSE / jnp.maximum(num_BS1, 1)) * num_experts / chosen
