"""What training minimises: a weighted sum of means.

Each part is summed over the whole batch, on all devices, and divided by the number of its own
tokens there, so neither padding nor packing nor the mesh changes it.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from glm5_jax.collectives import BATCH, MESH_AXES, total
from glm5_jax.model import Glm5, forward, predict_ahead
from glm5_jax.places import Places
from glm5_jax.queries import map_queries
from glm5_jax.sharding import DECODE, Rules, whole
from glm5_jax.vocabulary import cross_entropy, scores

# What the scores of a block of tokens may take: large, for every block reads the whole head.
_BLOCK_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """How the parts of the loss are weighted."""

    mtp_depth: int  # tokens further ahead than the next that are predicted
    mtp_weight: float  # of the mean over depths; DeepSeek-V3 has 0.3, later 0.1
    index_weight: float  # of the indexers' divergence, which moves nothing but the indexers

    def moves(self, path: str) -> bool:
        """Whether the weight at a path has a part in what is minimised."""
        is_ahead = path.startswith("mtp.")
        if is_ahead and self.mtp_depth == 0:
            return False
        if ".indexer." in path:
            return self.index_weight > 0
        return not is_ahead or self.mtp_weight > 0


class Losses(NamedTuple):
    """The parts of the loss, in nats per token."""

    next_token: jax.Array
    mtp_D: jax.Array  # by depth
    indexers: jax.Array  # how far the indexers are from the attention paid, the mean over layers


class Loads(NamedTuple):
    """How many tokens of the whole batch chose each expert, int32."""

    segments: tuple[tuple[jax.Array | None, ...], ...]  # by segment and slot, [groups, E]
    mtp_E: jax.Array | None  # summed over depths


def loss(
    model: Glm5,
    tokens_BT: jax.Array,
    places: Places,
    objective: Objective,
    *,
    rules: Rules = DECODE,
    remat: bool = False,
) -> tuple[jax.Array, tuple[Losses, Loads]]:
    """The training loss of a batch, its parts, and the experts' loads.

    On a mesh every device calls it with its part of the batch, and gets the same.

    Source: DeepSeek-V3, arXiv:2412.19437, equations 24 and 25, for the tokens further ahead;
    DeepSeek-V3.2, arXiv:2512.02556, equation 4, for the indexers.
    """
    teach = objective.index_weight > 0
    output = forward(
        model,
        tokens_BT,
        places,
        rules=rules,
        remat=remat,
        teach_indexers=teach,
        observe=lambda report: (report.load_E, report.index_nats),
    )
    ahead = []
    if objective.mtp_depth:
        ahead = predict_ahead(
            model,
            output.hidden_BTD,
            tokens_BT,
            places,
            objective.mtp_depth,
            rules=rules,
            teach_indexers=teach,
        )
    reports = [report for _, report in ahead]
    index_nats = [nats for segment in output.observed for _, nats in segment]
    index_nats += [report.index_nats for report in reports]
    num_queries = model.config.num_layers * _count(places.real_BT)
    num_queries += sum(_count(places.followed(1 + depth)) for depth in range(len(reports)))
    losses = Losses(
        next_token=next_token_loss(model, output.hidden_BTD, tokens_BT, places, 1, rules),
        mtp_D=jnp.array(
            [
                next_token_loss(model, hidden_BTD, tokens_BT, places, 1 + depth, rules)
                for depth, (hidden_BTD, _) in enumerate(ahead, start=1)
            ]
        ),
        indexers=total(_sum(index_nats), MESH_AXES) / num_queries,
    )
    loads = Loads(
        segments=tuple(tuple(load for load, _ in segment) for segment in output.observed),
        mtp_E=_sum_loads([report.load_E for report in reports]),
    )
    minimised = losses.next_token + objective.index_weight * losses.indexers
    if ahead:
        minimised = minimised + objective.mtp_weight * jnp.mean(losses.mtp_D)
    return minimised, (losses, total(loads, BATCH))


def next_token_loss(
    model: Glm5,
    hidden_BTD: jax.Array,
    tokens_BT: jax.Array,
    places: Places,
    distance: int,
    rules: Rules = DECODE,
) -> jax.Array:
    """The mean cross-entropy, in nats, of the tokens `distance` further on in their sequence."""
    head_ZD = whole(model.head, Glm5(model.config).head, rules)

    def nats_of(hidden_BTD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        return cross_entropy(scores(head_ZD, hidden_BTD), tokens_BT)

    batch = tokens_BT.shape[0]
    length = max(1, _BLOCK_BYTES // (2 * 4 * batch * head_ZD.shape[0]))
    nats_BT = map_queries(nats_of, length, hidden_BTD[:, :-distance], tokens_BT[:, distance:])
    counted_BT = places.followed(distance)[:, :-distance]
    summed = total(jnp.sum(jnp.where(counted_BT, nats_BT, 0)), BATCH)
    return summed / jnp.maximum(_count(counted_BT), 1)


def _count(marked_BT: jax.Array) -> jax.Array:
    """How many are marked on all devices."""
    return total(jnp.sum(marked_BT, dtype=jnp.float32), BATCH)


def _sum_loads(loads: list[jax.Array | None]) -> jax.Array | None:
    """The loads of one layer over its uses; None if it was not used."""
    counted = [load for load in loads if load is not None]
    return jnp.sum(jnp.stack(counted), axis=0) if counted else None


def _sum(parts: list[Any]) -> jax.Array:
    return sum((jnp.sum(part) for part in parts if part is not None), jnp.zeros(()))
