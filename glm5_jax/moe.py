"""Mixture of experts: the sigmoid router, the chosen experts and the shared expert."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from glm5_jax.collectives import MODEL, Axes, spread
from glm5_jax.config import Config, MoeConfig
from glm5_jax.exchange import apply_experts
from glm5_jax.experts import ExpertList
from glm5_jax.linear import product_f32
from glm5_jax.mlp import Mlp
from glm5_jax.params import bias, weight


class Routing(NamedTuple):
    """The experts of each token."""

    expert_BTK: jax.Array  # int32
    gate_BTK: jax.Array  # float32, what each expert's output is multiplied by
    score_BTE: jax.Array  # float32, of all experts, from 0 to 1


class Router(nnx.Module):
    """Weights of one layer's router.

    Source: DeepSeek-V3, arXiv:2412.19437, section 2.1.2.
    """

    def __init__(self, config: Config):
        self.config = config.moe
        self.weight = weight("routes embed", config.moe.num_experts, config.dim)
        # Balances the experts' loads and is moved by a rule, not by gradients. Rounding it to
        # bfloat16 would change which experts are chosen.
        self.bias = bias("routes", config.moe.num_experts, pinned_dtype="float32")

    def __call__(self, x_BTD: jax.Array) -> Routing:
        """Scores all experts and chooses the best, wholly in float32.

        The bias and the groups bear on the choice only; gates come from the bare scores.
        """
        scores_BTE = jax.nn.sigmoid(product_f32("BTD,ED->BTE", x_BTD, self.weight))
        ranked_BTE = jax.lax.stop_gradient(scores_BTE + self.bias)
        ranked_BTE = _within_best_groups(ranked_BTE, self.config)
        _, expert_BTK = jax.lax.top_k(ranked_BTE, self.config.experts_per_token)
        gate_BTK = jnp.take_along_axis(scores_BTE, expert_BTK, axis=-1)
        if self.config.normalize_gates:
            gate_BTK = gate_BTK / (jnp.sum(gate_BTK, axis=-1, keepdims=True) + 1e-20)
        return Routing(expert_BTK, gate_BTK * self.config.gate_scale, scores_BTE)


def _within_best_groups(ranked_BTE: jax.Array, config: MoeConfig) -> jax.Array:
    """Rules out the experts outside the best groups; a group is as good as its best two."""
    if config.num_groups == 1:
        return ranked_BTE
    grouped_BTGE = ranked_BTE.reshape(*ranked_BTE.shape[:-1], config.num_groups, -1)
    best_two_BTG2, _ = jax.lax.top_k(grouped_BTGE, 2)
    _, chosen_BTM = jax.lax.top_k(jnp.sum(best_two_BTG2, axis=-1), config.groups_per_token)
    is_chosen_BTG = jnp.any(chosen_BTM[..., None] == jnp.arange(config.num_groups), axis=-2)
    return jnp.where(is_chosen_BTG[..., None], grouped_BTGE, -jnp.inf).reshape(ranked_BTE.shape)


class Moe(nnx.Module):
    """Weights of one layer's router and shared expert.

    Routed experts are kept beside the layers (`segment.Segment`) and passed in: they are most of
    the model, and decoding must not copy a layer's experts to read a few of them.
    """

    def __init__(self, config: Config):
        self.router = Router(config)
        self.shared = Mlp(config.dim, config.moe.ffn * config.moe.num_shared_experts)

    def __call__(
        self,
        x_BTD: jax.Array,
        experts: ExpertList,
        counted_BT: jax.Array,
        expert_axes: Axes,
    ) -> tuple[jax.Array, ExpertList, jax.Array, Routing]:
        """Applies the chosen experts and the shared one.

        Args:
          counted_BT: which tokens are to have experts; others, as those of padding, read none.
          expert_axes: of the mesh, that the experts are divided over.

        Returns:
          BTD, of this device's share of the feed-forward width; the experts as `weighted_experts`
          returns them; the load of each expert: how many counted tokens of this device chose it,
          E int32; and the experts of each token.
        """
        num_experts = self.router.config.num_experts
        routing = self.router(x_BTD)
        expert_BTK = jnp.where(counted_BT[..., None], routing.expert_BTK, num_experts)
        load_E = jnp.zeros(num_experts, jnp.int32).at[expert_BTK].add(1, mode="drop")
        x_BTD, gate_BTK = spread((x_BTD, routing.gate_BTK), (MODEL,))
        routed_BTD, experts = apply_experts(
            experts, x_BTD, expert_BTK, gate_BTK, num_experts=num_experts, axes=expert_axes
        )
        return routed_BTD + self.shared(x_BTD), experts, load_E, routing
