"""Muon: steps along momentum whose matrices are made orthogonal."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from glm5_jax.params import ParamSpec

_MOMENTUM = 0.95
_ITERATIONS = 5
# Of the polynomial that pulls singular values towards 1, fast rather than all the way.
_LINEAR, _CUBIC, _QUINTIC = 3.4445, -4.7750, 2.0315
_UPDATE_RMS = 0.2  # of an update's entries, which is AdamW's too: learning rates mean the same
_STACKED = frozenset({"layers", "experts"})  # axes that hold matrices side by side
_HEADS = frozenset({"heads", "index_heads"})  # of rows, where they come first


class Cut(NamedTuple):
    """Where a weight is cut before its parts are made orthogonal, each on its own."""

    by_head: bool
    sizes: tuple[int, ...] = ()  # of parts of each head's rows; none if there is one part


def muon(
    specs: Mapping[str, ParamSpec],
    cuts: Mapping[str, Cut],
    rate: optax.Schedule,
    weight_decay: float,
) -> optax.GradientTransformation:
    """Muon over matrices by path.

    Args:
      cuts: by path, of those that are cut; others are one matrix for each layer and expert, heads
        side by side.

    Source: Jordan et al., "Muon", 2024; Liu et al., arXiv:2502.16982, section 2.2, for weight decay
    and the size of updates; GLM-5, arXiv:2602.15763, section 2.1, for cutting by heads.
    """

    def step(updates: optax.Updates, params: optax.Params | None = None) -> optax.Updates:
        return {
            path: update
            if isinstance(update, optax.MaskedNode)  # is another optimizer's
            else orthogonalized(update, specs[path], cuts.get(path, Cut(by_head=False)))
            for path, update in updates.items()
        }

    return optax.chain(
        optax.trace(decay=_MOMENTUM, nesterov=True),
        optax.stateless(step),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(rate),
    )


def orthogonalized(update: jax.Array, spec: ParamSpec, cut: Cut) -> jax.Array:
    """The matrices with singular values brought near each other, of the usual size of an update.

    Each device does this for all matrices whose stacked axes it holds, gathered whole: it takes the
    memory of all layers of a weight.
    """
    stacked = [name in _STACKED or (cut.by_head and name in _HEADS) for name in spec.axes]
    placed = jax.typeof(update).sharding.spec
    whole = PartitionSpec(
        *(axes if kept else None for axes, kept in zip(placed, stacked, strict=True))
    )
    is_placed = not jax.sharding.get_abstract_mesh().empty
    if is_placed:
        update = jax.sharding.reshard(update, whole)
    lead = stacked.count(True)
    matrix = update.shape[lead:]
    num_rows = math.prod(matrix[:-1] if spec.axes[lead] in _HEADS else matrix[:1])
    flat = update.reshape(*update.shape[:lead], num_rows, -1)
    starts = [sum(cut.sizes[:number]) for number in range(1, len(cut.sizes))]
    parts = [_orthogonal(part) for part in jnp.split(flat, starts, axis=-2)]
    update = jnp.concatenate(parts, axis=-2).reshape(update.shape)
    return jax.sharding.reshard(update, placed) if is_placed else update


def _orthogonal(matrices: jax.Array) -> jax.Array:
    """Newton-Schulz iteration on the last two axes."""
    rows, columns = matrices.shape[-2:]
    x = matrices / (jnp.linalg.norm(matrices, axis=(-2, -1), keepdims=True) + 1e-8)
    if rows > columns:
        x = jnp.swapaxes(x, -2, -1)
    for _ in range(_ITERATIONS):
        square = x @ jnp.swapaxes(x, -2, -1)
        x = _LINEAR * x + (_CUBIC * square + _QUINTIC * square @ square) @ x
    if rows > columns:
        x = jnp.swapaxes(x, -2, -1)
    return x * _UPDATE_RMS * max(rows, columns) ** 0.5
