"""The routed experts: an exact, dropless product of every token with its chosen experts.

A loop over blocks of rows (`dispatch`) reads each expert's weights where they are; nothing is
dropped and no expert that nobody chose is computed.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from glm5_jax.bits import as_bits, from_bits
from glm5_jax.collectives import alike, platform
from glm5_jax.config import Config
from glm5_jax.dispatch import Dispatch, dispatch
from glm5_jax.linear import project_f32
from glm5_jax.params import weight
from glm5_jax.quantized import is_quantized
from glm5_jax.queries import in_sight, in_version, lengths_in_sight, padded_to

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


class ExpertList(NamedTuple):
    """Experts of one layer or of several in a row, and the path of their gradient.

    If every layer of a scan returned a gradient of the list that all of them read, it would be of
    all experts each time, to be added up. So `taught` passes through the layers instead: going
    back, each of them adds to its gradient where it is.
    """

    weights: Experts  # what is read; it has no gradient
    first: jax.Array  # where the layer's experts begin
    # The same weights, of float32 if of several layers; None where no gradient is wanted.
    taught: Experts | None

    @classmethod
    def of(cls, experts: Experts) -> "ExpertList":
        """That of one layer; weights that are kept in few bits or as bits have no gradient."""
        leaves = jax.tree.leaves(experts)
        has_gradient = all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves)
        weights, first = jax.lax.stop_gradient(experts), jnp.zeros((), jnp.int32)
        return cls(weights, first, experts if has_gradient else None)


def weighted_experts(
    experts: ExpertList,
    x_TD: jax.Array,
    expert_TK: jax.Array,
    gate_TK: jax.Array,
    num_experts: int,
    mean_load: int,
) -> tuple[jax.Array, ExpertList]:
    """The sum of each token's chosen experts, weighted by their gates.

    Args:
      expert_TK: the experts chosen, counted from the layer's first; those from `num_experts` on are
        elsewhere and add nothing.
      mean_load: as in `dispatch`.

    Returns:
      TD in the dtype of `x_TD`, summed in float32, differentiable in experts, x and gates; and the
      same list, whose `taught` is for the next layer that reads it.
    """
    plan = dispatch(expert_TK, num_experts, mean_load)
    y_TD, taught = _weighted_experts(*alike(experts, x_TD, gate_TK, plan))
    return y_TD, experts._replace(taught=taught)


def _indexable(experts: Experts) -> Experts:
    """Experts as a loop can index them: on a CPU the bits of small floats (`bits.as_bits`)."""
    if platform() != "cpu":
        return experts
    return jax.tree.map(
        lambda w: w if is_quantized(w) else as_bits(w), experts, is_leaf=is_quantized
    )


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


def _block(plan: Dispatch, number: jax.Array, first: jax.Array) -> _Block:
    return _Block(plan.token_GM[number], plan.choice_GM[number], first + plan.expert_G[number])


@jax.custom_vjp
def _weighted_experts(
    experts: ExpertList, x_TD: jax.Array, gate_TK: jax.Array, plan: Dispatch
) -> tuple[jax.Array, Experts | None]:
    weights = _indexable(experts.weights)

    def add_block(number: jax.Array, y_TD: jax.Array) -> jax.Array:
        block = _block(plan, number, experts.first)
        expert = _one_expert(weights, block.expert, x_TD.dtype)
        by_row = (block.rows_of(x_TD), block.gates_of(gate_TK))
        apply = functools.partial(_apply_one, expert)
        y_MD = block.of_used(len(x_TD), apply, by_row, keeps_rows=True)
        return y_TD.at[block.token_M].add(y_MD, mode="drop")

    nothing_TD = jnp.zeros_like(x_TD, jnp.float32)
    return _loop(plan, add_block, nothing_TD).astype(x_TD.dtype), experts.taught


def _loop(plan: Dispatch, add_block: Callable[[jax.Array, Any], Any], start: Any) -> Any:
    """Adds up the blocks in use."""
    with jax.named_scope(BLOCK_LOOP):
        return jax.lax.fori_loop(0, plan.num_used, add_block, start)


_Saved = tuple[ExpertList, jax.Array, jax.Array, Dispatch]


def _save(
    experts: ExpertList, x_TD: jax.Array, gate_TK: jax.Array, plan: Dispatch
) -> tuple[tuple[jax.Array, Experts | None], _Saved]:
    # Without `taught`, which a layer that is recomputed would otherwise need, and have kept for it.
    read = experts._replace(taught=None)
    y_TD, _ = _weighted_experts(read, x_TD, gate_TK, plan)
    return (y_TD, experts.taught), (read, x_TD, gate_TK, plan)


def _backward(
    saved: _Saved, given: tuple[jax.Array, Experts | None]
) -> tuple[ExpertList, jax.Array, jax.Array, None]:
    """The same loop over blocks, each block's hidden state computed again.

    The gradients of the experts are added to those of the layers after this one, in place, in
    float32.
    """
    experts, x_TD, gate_TK, plan = saved
    dy_TD, d_taught = given
    dy_TD = dy_TD.astype(jnp.float32)
    weights = _indexable(experts.weights)

    Carry = tuple[Experts | None, jax.Array, jax.Array]

    def add_block(number: jax.Array, carry: Carry) -> Carry:
        d_taught, dx_TD, dgate_TK = carry
        block = _block(plan, number, experts.first)
        expert = _one_expert(weights, block.expert, x_TD.dtype)

        def pull_back(x_MD: jax.Array, gate_M: jax.Array, dy_MD: jax.Array) -> Any:
            return jax.vjp(_apply_one, expert, x_MD, gate_M)[1](dy_MD)

        by_row = (block.rows_of(x_TD), block.gates_of(gate_TK), block.rows_of(dy_TD))
        keeps_rows = (jax.tree.map(lambda _: False, expert), True, True)
        d_expert, dx_MD, dgate_M = block.of_used(len(x_TD), pull_back, by_row, keeps_rows)
        if d_taught is not None:
            d_taught = jax.tree.map(
                lambda total, part: total.at[block.expert].add(part.astype(jnp.float32)),
                d_taught,
                d_expert,
            )
        dx_TD = dx_TD.at[block.token_M].add(dx_MD.astype(jnp.float32), mode="drop")
        return (
            d_taught,
            dx_TD,
            dgate_TK.at[block.token_M, block.choice_M].add(dgate_M, mode="drop"),
        )

    so_far = jax.tree.map(lambda d: d.astype(jnp.float32), d_taught)
    nothing = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), (x_TD, gate_TK))
    summed, dx_TD, dgate_TK = _loop(plan, add_block, (so_far, *nothing))
    taught = jax.tree.map(lambda total, d: total.astype(d.dtype), summed, d_taught)
    none: Any = None
    return (
        ExpertList(none, none, taught),
        dx_TD.astype(x_TD.dtype),
        dgate_TK.astype(gate_TK.dtype),
        None,
    )


_weighted_experts.defvjp(_save, _backward)
