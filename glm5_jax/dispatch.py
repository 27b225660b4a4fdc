"""Tokens sorted by their experts and laid out in blocks of rows that share one expert."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from glm5_jax.collectives import platform

# Rows of a block: a block is computed whole, or nearly, and reads its expert's weights once, so it
# should be full and yet large. Small loads are made one block; large ones at least four.
_LARGE_BLOCK, _LARGEST_BLOCK = 128, 512
# Of an accelerator, which reads an expert for longer than it multiplies with up to about so many
# rows: blocks have twice the mean load there, so that an expert seldom needs to be read again.
_SMALLEST_ACCELERATOR_BLOCK, _FREE_ROWS = 8, 64


class Dispatch(NamedTuple):
    """Where each (token, choice) goes among G blocks of M rows; those in use come first in each."""

    token_GM: jax.Array  # the token in each row; T in rows that are not used
    choice_GM: jax.Array  # which of the token's choices the row is
    expert_G: jax.Array
    num_used: jax.Array  # blocks in use; they come first


def _block_length(mean_load: int) -> int:
    if mean_load <= 4 * _LARGE_BLOCK:
        block = 1 << max(0, mean_load - 1).bit_length()
        if platform() != "cpu":
            block = max(block, min(2 * block, _FREE_ROWS), _SMALLEST_ACCELERATOR_BLOCK)
        return min(_LARGE_BLOCK, block)
    return min(_LARGEST_BLOCK, 1 << (mean_load // 4).bit_length() - 1)


def expected_blocks(num_pairs: int, num_experts: int, num_here: int) -> float:
    """How many blocks a device runs for its experts, the mean if tokens choose at random.

    Args:
      num_pairs: of tokens and choices, among all experts.
      num_here: experts of this device.
    """
    mean, block = num_pairs / num_experts, _block_length(num_pairs // num_experts)
    most = int(mean + 12 * math.sqrt(mean) + 20)
    chance = [math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) for k in range(most)]
    return num_here * sum(-(-load // block) * share for load, share in enumerate(chance))


def dispatch(expert_TK: jax.Array, num_experts: int, mean_load: int) -> Dispatch:
    """Sorts (token, choice) pairs by expert, each expert starting a new block.

    The number of blocks is the largest that any routing can need, so shapes do not depend on it.

    Args:
      expert_TK: from 0; those from `num_experts` on are elsewhere, and get no row.
      mean_load: how many pairs an expert is expected to have; blocks are about as large.
    """
    num_tokens, num_choices = expert_TK.shape
    num_pairs = num_tokens * num_choices
    # No expert has more rows than there are tokens.
    block = min(_block_length(mean_load), 1 << (num_tokens - 1).bit_length())
    most_experts = min(num_experts, num_pairs)
    num_blocks = most_experts + (num_pairs - most_experts) // block

    expert_N = jnp.minimum(expert_TK.reshape(-1), num_experts)
    order_N = jnp.argsort(expert_N, stable=True).astype(jnp.int32)
    sorted_N = expert_N[order_N]
    load_E = jnp.zeros(num_experts + 1, jnp.int32).at[expert_N].add(1)
    blocks_E = -(-load_E // block)
    last_block_E = jnp.cumsum(blocks_E)
    first_row_E = (last_block_E - blocks_E) * block
    first_pair_E = jnp.cumsum(load_E) - load_E
    rank_N = jnp.arange(num_pairs, dtype=jnp.int32) - first_pair_E[sorted_N]
    row_N = jnp.where(sorted_N < num_experts, first_row_E[sorted_N] + rank_N, num_blocks * block)

    pair_R = jnp.full(num_blocks * block, num_pairs, jnp.int32).at[row_N].set(order_N, mode="drop")
    last_block_E = last_block_E[:num_experts]
    expert_G = jnp.searchsorted(last_block_E, jnp.arange(num_blocks), side="right")
    return Dispatch(
        token_GM=(pair_R // num_choices).reshape(num_blocks, block),
        choice_GM=(pair_R % num_choices).reshape(num_blocks, block),
        expert_G=jnp.minimum(expert_G, num_experts - 1).astype(jnp.int32),
        num_used=last_block_E[-1],
    )
