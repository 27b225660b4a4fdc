"""The routed experts: an exact, dropless product of every token with its chosen experts.

Tokens are sorted by expert and laid out in blocks of rows that share one expert. A loop over the
blocks in use then reads each expert's weights where they are; nothing is dropped and no expert
that nobody chose is computed.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from glm5_jax.bits import from_bits
from glm5_jax.collectives import alike, platform
from glm5_jax.config import Config
from glm5_jax.linear import project_f32
from glm5_jax.params import weight
from glm5_jax.quantized import is_quantized
from glm5_jax.queries import in_sight, in_version, lengths_in_sight, padded_to

# Rows of a block: a block is computed whole, or nearly, and reads its expert's weights once, so it
# should be full and yet large. Small loads are made one block; large ones at least four.
_LARGE_BLOCK, _LARGEST_BLOCK = 128, 512
# Of an accelerator, which reads an expert for longer than it multiplies with up to about so many
# rows: blocks have twice the mean load there, so that an expert seldom needs to be read again.
_SMALLEST_ACCELERATOR_BLOCK, _FREE_ROWS = 8, 64
# On a CPU a block has versions that leave out rows behind those in use, down to so many.
_FEWEST_ROWS = 16
# Names the loop in traces: how often it runs depends on the routing, which a planner must estimate.
BLOCK_LOOP = "expert_blocks"


class Experts(nnx.Module):
    """Weights of one layer's routed experts, each a SwiGLU feed-forward network."""

    def __init__(self, config: Config):
        experts, ffn, dim = config.moe.num_experts, config.moe.ffn, config.dim
        self.gate = weight("experts ffn embed", experts, ffn, dim)
        self.up = weight("experts ffn embed", experts, ffn, dim)
        self.down = weight("experts embed ffn", experts, dim, ffn)

    def in_a_row(self) -> "Experts":
        """Stacked layers' experts [L, E, ...] as one list [L * E, ...]; moves no data."""
        return jax.tree.map(lambda w: w.reshape(-1, *w.shape[2:]), self)


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


def weighted_experts(
    experts: Experts,
    first_expert: jax.Array,
    x_TD: jax.Array,
    expert_TK: jax.Array,
    gate_TK: jax.Array,
    num_experts: int,
    mean_load: int,
) -> jax.Array:
    """The sum of each token's chosen experts, weighted by their gates.

    Args:
      experts: a list of experts, of which this layer's begin at `first_expert`.
      expert_TK: the experts chosen, counted from `first_expert`; those from `num_experts` on are
        elsewhere and add nothing.
      mean_load: as in `dispatch`.

    Returns:
      TD in the dtype of `x_TD`, summed in float32. Differentiable in experts, x and gates.
    """
    plan = dispatch(expert_TK, num_experts, mean_load)
    return _weighted_experts(*alike(experts, first_expert, x_TD, gate_TK, plan))


def _one_expert(experts: Experts, index: jax.Array, dtype: jnp.dtype) -> Experts:
    """The weights of one expert, without the leading axis."""

    def take(stack: Any) -> jax.Array:
        one = stack[index]
        return one.multiplied_out() if is_quantized(one) else from_bits(one, dtype)

    return jax.tree.map(take, experts, is_leaf=is_quantized)


def _apply_one(expert: Experts, x_MD: jax.Array, gate_M: jax.Array) -> jax.Array:
    """One expert's output for a block of rows, times their gates; MD float32.

    The gates multiply the hidden state: the gradient of a gate then needs no output.
    """
    gate_MF = project_f32("MD,FD->MF", x_MD, expert.gate)
    up_MF = project_f32("MD,FD->MF", x_MD, expert.up)
    hidden_MF = jax.nn.silu(gate_MF) * up_MF * gate_M[:, None]
    return project_f32("MF,DF->MD", hidden_MF.astype(x_MD.dtype), expert.down)


class _Block(NamedTuple):
    """The rows of one block and their expert."""

    token_M: jax.Array
    choice_M: jax.Array
    expert: jax.Array  # its place in the list

    def rows_of(self, x_TD: jax.Array) -> jax.Array:
        """Each row's token, MD; rows that are not used hold some token, and a gate of zero."""
        return x_TD.at[self.token_M].get(mode="clip")

    def gates_of(self, gate_TK: jax.Array) -> jax.Array:
        return gate_TK.at[self.token_M, self.choice_M].get(mode="fill", fill_value=0)

    def of_used(
        self, num_tokens: int, function: Callable[..., Any], by_row: Any, keeps_rows: Any
    ) -> Any:
        """A function of arrays by row, computed by the smallest version that has all rows in use.

        Args:
          by_row: a tree of arrays M...
          keeps_rows: which parts of the result are by row; they get zeros for the rows left out.
        """
        num_rows = len(self.token_M)
        lengths = lengths_in_sight(num_rows, _FEWEST_ROWS)

        def of_first(length: int) -> Any:
            result = function(*jax.tree.map(lambda rows: rows[:length], by_row))
            return jax.tree.map(
                lambda keeps, part: padded_to(part, num_rows) if keeps else part, keeps_rows, result
            )

        return in_version(in_sight(self.token_M < num_tokens, lengths), lengths, of_first)


def _block(plan: Dispatch, number: jax.Array, first_expert: jax.Array) -> _Block:
    return _Block(
        plan.token_GM[number], plan.choice_GM[number], first_expert + plan.expert_G[number]
    )


@jax.custom_vjp
def _weighted_experts(
    experts: Experts, first_expert: jax.Array, x_TD: jax.Array, gate_TK: jax.Array, plan: Dispatch
) -> jax.Array:
    def add_block(number: jax.Array, y_TD: jax.Array) -> jax.Array:
        block = _block(plan, number, first_expert)
        expert = _one_expert(experts, block.expert, x_TD.dtype)
        by_row = (block.rows_of(x_TD), block.gates_of(gate_TK))
        apply = functools.partial(_apply_one, expert)
        y_MD = block.of_used(len(x_TD), apply, by_row, keeps_rows=True)
        return y_TD.at[block.token_M].add(y_MD, mode="drop")

    nothing_TD = jnp.zeros_like(x_TD, jnp.float32)
    return _loop(plan, add_block, nothing_TD).astype(x_TD.dtype)


def _loop(plan: Dispatch, add_block: Callable[[jax.Array, Any], Any], start: Any) -> Any:
    """Adds up the blocks in use."""
    with jax.named_scope(BLOCK_LOOP):
        return jax.lax.fori_loop(0, plan.num_used, add_block, start)


_Saved = tuple[Experts, jax.Array, jax.Array, jax.Array, Dispatch]


def _save(
    experts: Experts, first_expert: jax.Array, x_TD: jax.Array, gate_TK: jax.Array, plan: Dispatch
) -> tuple[jax.Array, _Saved]:
    saved = (experts, first_expert, x_TD, gate_TK, plan)
    return _weighted_experts(*saved), saved


def _backward(saved: _Saved, dy_TD: jax.Array) -> tuple[Experts, None, jax.Array, jax.Array, None]:
    """The same loop over blocks, each block's hidden state computed again.

    The gradients of all experts are summed in place, in float32.
    """
    experts, first_expert, x_TD, gate_TK, plan = saved
    dy_TD = dy_TD.astype(jnp.float32)

    Carry = tuple[Experts, jax.Array, jax.Array]

    def add_block(number: jax.Array, carry: Carry) -> Carry:
        d_experts, dx_TD, dgate_TK = carry
        block = _block(plan, number, first_expert)
        expert = _one_expert(experts, block.expert, x_TD.dtype)

        def pull_back(x_MD: jax.Array, gate_M: jax.Array, dy_MD: jax.Array) -> Any:
            return jax.vjp(_apply_one, expert, x_MD, gate_M)[1](dy_MD)

        by_row = (block.rows_of(x_TD), block.gates_of(gate_TK), block.rows_of(dy_TD))
        keeps_rows = (jax.tree.map(lambda _: False, expert), True, True)
        d_expert, dx_MD, dgate_M = block.of_used(len(x_TD), pull_back, by_row, keeps_rows)
        d_experts = jax.tree.map(
            lambda total, part: total.at[block.expert].add(part.astype(jnp.float32)),
            d_experts,
            d_expert,
        )
        dx_TD = dx_TD.at[block.token_M].add(dx_MD.astype(jnp.float32), mode="drop")
        return (
            d_experts,
            dx_TD,
            dgate_TK.at[block.token_M, block.choice_M].add(dgate_M, mode="drop"),
        )

    start = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), (experts, x_TD, gate_TK))
    d_experts, dx_TD, dgate_TK = _loop(plan, add_block, start)
    return (
        jax.tree.map(lambda d, w: d.astype(w.dtype), d_experts, experts),
        None,
        dx_TD.astype(x_TD.dtype),
        dgate_TK.astype(gate_TK.dtype),
        None,
    )


_weighted_experts.defvjp(_save, _backward)
