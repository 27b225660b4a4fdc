"""Experts on many devices: tokens are brought to their experts, and what comes of them back.

Two ways to do it give every device the same number of rows for its experts, enough for every token
of all devices, so that nothing is dropped however uneven the loads.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from glm5_jax.collectives import Axes, gathered, num_shards, ragged, shard_index, total_share
from glm5_jax.experts import ExpertList, weighted_experts


class Rows(NamedTuple):
    """Tokens and what is to be done with them."""

    x_TD: jax.Array
    expert_TK: jax.Array  # among the experts of all devices
    gate_TK: jax.Array


def apply_experts(
    experts: ExpertList,
    x_BTD: jax.Array,
    expert_BTK: jax.Array,
    gate_BTK: jax.Array,
    *,
    num_experts: int,
    axes: Axes = (),
) -> tuple[jax.Array, ExpertList]:
    """The sum of each token's chosen experts, weighted by their gates.

    Args:
      experts: those of this device.
      expert_BTK: the experts chosen; `num_experts` is none.
      axes: of the mesh, that the experts are divided over.

    Returns:
      BTD in the dtype of `x_BTD`, of this device's share of the feed-forward width; and the list as
      `weighted_experts` returns it.
    """
    num_choices = expert_BTK.shape[-1]
    own = Rows(
        x_BTD.reshape(-1, x_BTD.shape[-1]),
        expert_BTK.reshape(-1, num_choices),
        gate_BTK.reshape(-1, num_choices),
    )
    kept = num_experts // num_shards(axes)
    rows = _bring(own, num_experts, axes)
    kept_TK = rows.expert_TK - shard_index(axes) * kept
    y_TD, experts = weighted_experts(
        experts,
        rows.x_TD,
        jnp.where(kept_TK < 0, kept, kept_TK),
        rows.gate_TK,
        num_experts=kept,
        mean_load=rows.expert_TK.size // num_experts,
    )
    return _take_back(y_TD, own.expert_TK, num_experts, axes).reshape(x_BTD.shape), experts


def _bring(own: Rows, num_experts: int, axes: Axes) -> Rows:
    """The rows that this device's experts need, of all devices, and perhaps others."""
    if not _sends_less(own.expert_TK, axes):
        return bring_all(own, axes)
    return jax.lax.platform_dependent(
        own,
        tpu=lambda own: bring_chosen(own, num_experts, axes),
        default=lambda own: bring_all(own, axes),
    )


def _take_back(y_TD: jax.Array, expert_TK: jax.Array, num_experts: int, axes: Axes) -> jax.Array:
    """The sums, over the devices, of what they computed of this device's tokens."""
    if not _sends_less(expert_TK, axes):
        return total_share(y_TD, axes, 0)
    return jax.lax.platform_dependent(
        y_TD,
        expert_TK,
        tpu=lambda y_TD, expert_TK: take_back_chosen(y_TD, expert_TK, num_experts, axes),
        default=lambda y_TD, _: total_share(y_TD, axes, 0),
    )


def _sends_less(expert_TK: jax.Array, axes: Axes) -> bool:
    """Whether there are more devices than a token has experts, so that most need not see it.

    Sending to few is for TPUs: XLA's CPU backend has no ragged exchange (jax-ml/jax#34755), and on
    GPUs that of jaxlib 0.11 has given wrong gradients (marin-community/marin#8077).
    """
    return num_shards(axes) > expert_TK.shape[1]


def bring_all(own: Rows, axes: Axes) -> Rows:
    """Every device gets all rows."""
    return Rows(*(gathered(part, axes, 0) for part in own))


def bring_chosen(own: Rows, num_experts: int, axes: Axes) -> Rows:
    """Every device gets the rows that chose one of its experts, and rows without an expert."""
    plan = _plan(own.expert_TK, num_experts, axes)
    nothing = Rows(
        jnp.zeros_like(own.x_TD), jnp.full_like(own.expert_TK, num_experts), own.gate_TK * 0
    )

    def send(part: jax.Array, empty: jax.Array) -> jax.Array:
        sent = part.at[plan.token_R].get(mode="clip")
        received = jnp.concatenate([empty] * num_shards(axes))
        there, here = plan.away, plan.home
        return ragged(
            sent, received, there.offset_N, there.size_N, plan.lands_there_N, here.size_N, axes
        )

    return Rows(*(send(part, empty) for part, empty in zip(own, nothing, strict=True)))


def take_back_chosen(
    y_TD: jax.Array, expert_TK: jax.Array, num_experts: int, axes: Axes
) -> jax.Array:
    """Undoes `bring_chosen`: sums, for each own token, the rows that come back."""
    plan = _plan(expert_TK, num_experts, axes)
    num_tokens = expert_TK.shape[0]
    empty_RD = jnp.zeros((plan.token_R.shape[0], y_TD.shape[1]), y_TD.dtype)
    there, here = plan.away, plan.home
    back_RD = ragged(
        y_TD, empty_RD, here.offset_N, here.size_N, plan.lands_here_N, there.size_N, axes
    )
    sums_TD = jnp.zeros((num_tokens, y_TD.shape[1]), jnp.float32)
    sums_TD = sums_TD.at[plan.token_R].add(back_RD.astype(jnp.float32), mode="drop")
    return sums_TD.astype(y_TD.dtype)


class _Parts(NamedTuple):
    """Where each of N devices' rows lie in a buffer."""

    offset_N: jax.Array
    size_N: jax.Array


class _Plan(NamedTuple):
    """Which row goes where, N devices exchanging with each other."""

    token_R: jax.Array  # of each row that is sent, by device; the number of tokens in rows unused
    away: _Parts  # rows to send, by destination
    home: _Parts  # rows received, by origin
    lands_there_N: jax.Array  # where the rows sent lie with their destination
    lands_here_N: jax.Array  # where the rows received lay with their origin


def _plan(expert_TK: jax.Array, num_experts: int, axes: Axes) -> _Plan:
    num_tokens, num_choices = expert_TK.shape
    shards, me = num_shards(axes), shard_index(axes)
    device_TK = expert_TK // (num_experts // shards)
    chosen_TN = jnp.any(device_TK[..., None] == jnp.arange(shards), axis=1)
    size_N = jnp.sum(chosen_TN, axis=0, dtype=jnp.int32)
    offset_N = jnp.cumsum(size_N) - size_N

    most = num_tokens * min(num_choices, shards)
    row_TN = offset_N + jnp.cumsum(chosen_TN, axis=0, dtype=jnp.int32) - 1
    token_TN = jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32)[:, None], row_TN.shape)
    token_R = jnp.full(most, num_tokens, jnp.int32)
    token_R = token_R.at[jnp.where(chosen_TN, row_TN, most)].set(token_TN, mode="drop")

    sizes_NN = gathered(size_N[None], axes, 0)  # by origin and destination
    before_NN = jnp.cumsum(sizes_NN, axis=0) - sizes_NN
    offsets_NN = jnp.cumsum(sizes_NN, axis=1) - sizes_NN
    return _Plan(
        token_R=token_R,
        away=_Parts(offset_N, size_N),
        home=_Parts(before_NN[:, me], sizes_NN[:, me]),
        lands_there_N=before_NN[me],
        lands_here_N=offsets_NN[:, me],
    )
