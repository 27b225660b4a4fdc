"""What training minimises: a weighted sum of means.

Each part is summed over the whole batch, on all devices and in all its microbatches, and divided by
the number of its own tokens there; so neither padding nor packing, the mesh or the accumulation of
gradients changes it.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from glm5_jax.block import Report
from glm5_jax.collectives import BATCH, MESH_AXES, Axes, total
from glm5_jax.config import Config
from glm5_jax.layers import LayerPlace
from glm5_jax.model import Glm5, forward, predict_ahead
from glm5_jax.places import Places
from glm5_jax.segment import Remat
from glm5_jax.sharding import DECODE, Rules
from train.balance import imbalance
from train.prediction import next_token_sums


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """What is learnt, and how the parts of the loss are weighted.

    `dense` teaches the model, all of whose tokens attend to all before them; `warmup` teaches the
    indexers alone, what that attention is; `sparse` teaches both, where tokens attend to those that
    the indexers select.

    Source: DeepSeek-V3.2, arXiv:2512.02556, section 2.1; GLM-5, arXiv:2602.15763, section 2.1.
    """

    stage: str = "sparse"
    mtp_depth: int  # tokens further ahead than the next that are predicted
    mtp_weight: float  # of the mean over depths; DeepSeek-V3 has 0.3, later 0.1
    index_weight: float  # of the indexers' divergence, which moves nothing but the indexers
    balance_weight: float = 0.0  # of the experts' imbalance in sequences; DeepSeek-V3 has 1e-4
    z_weight: float = 0.0  # of the square of the scores' log-sum-exp

    @property
    def teaches_indexers(self) -> bool:
        """Whether indexers learn."""
        return self.stage != "dense" and self.index_weight > 0

    def moves(self, path: str) -> bool:
        """Whether the weight at a path has a part in what is minimised."""
        is_ahead = path.startswith("mtp.")
        if is_ahead and self.mtp_depth == 0:
            return False
        if ".indexer." in path:
            return self.teaches_indexers
        if self.stage == "warmup":
            return False
        return not is_ahead or self.mtp_weight > 0

    @property
    def attends_to_all(self) -> bool:
        """Whether tokens attend to all before them, and not to those that indexers select."""
        return self.stage != "sparse"

    def attending(self, config: Config) -> Config:
        """The config of the model as it attends in this stage."""
        if not self.attends_to_all:
            return config
        everything = dataclasses.replace(config.indexer, topk=config.max_positions)
        return dataclasses.replace(config, indexer=everything)


class Losses(NamedTuple):
    """The parts of the loss, to be told; the first four in nats per token.

    Those of tokens that are predicted have no gradient: `loss` returns what does.
    """

    next_token: jax.Array
    mtp_D: jax.Array  # by depth
    # How far the indexer that serves a layer is from the attention paid there, by layer; after the
    # last one that of the MTP layer, over all depths. Empty where indexers do not learn.
    indexer_L: jax.Array
    indexers: jax.Array  # the mean over layers and depths
    imbalance: jax.Array  # of experts in sequences, the mean over layers: 1 is balanced; 0 unknown
    z: jax.Array  # the square of the log-sum-exp of the scores


class Loads(NamedTuple):
    """How many tokens of the whole batch chose each expert, int32."""

    segments: tuple[tuple[jax.Array | None, ...], ...]  # by segment and slot, [groups, E]
    mtp_E: jax.Array | None  # summed over depths


def count_followed(places: Places, mtp_depth: int) -> jax.Array:
    """For each distance up to `mtp_depth` + 1, how many tokens have one of their own so far on."""
    return jnp.stack([_count(places.followed(distance)) for distance in range(mtp_depth + 2)])


def loss(
    model: Glm5,
    tokens_BT: jax.Array,
    places: Places,
    objective: Objective,
    followed_D: jax.Array | None = None,
    *,
    mtp_weight: jax.Array | float | None = None,
    rules: Rules = DECODE,
    remat: Remat = "none",
) -> tuple[jax.Array, tuple[Losses, Loads]]:
    """The training loss of a batch, its parts, and the experts' loads.

    On a mesh every device calls it with its part of the batch, and gets the same.

    Args:
      followed_D: what `count_followed` gives of a larger batch that this one is a part of. The
        losses of its parts then add up to that of the whole, as loads do.
      mtp_weight: instead of the objective's.

    Source: DeepSeek-V3, arXiv:2412.19437, equations 17 to 20 for the experts, 24 and 25 for the
    tokens further ahead; DeepSeek-V3.2, arXiv:2512.02556, equations 3 and 4, for the indexers.
    """
    if followed_D is None:
        followed_D = count_followed(places, objective.mtp_depth)
    followed_D = jnp.maximum(followed_D, 1)
    teach = objective.teaches_indexers

    def observe(counted_BT: jax.Array, report: Report) -> _Seen:
        uneven = None
        if objective.balance_weight and report.routing is not None:
            uneven = imbalance(report.routing, places.segment_BT, counted_BT)
        return _Seen(report.load_E, report.index_nats, uneven)

    output = forward(
        model,
        tokens_BT,
        places,
        rules=rules,
        remat=remat,
        teach_indexers=teach,
        observe=functools.partial(observe, places.real_BT),
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
            remat=remat,
        )
    seen_ahead = [
        observe(places.followed(depth), report) for depth, (_, report) in enumerate(ahead, start=1)
    ]
    if objective.mtp_weight == 0:  # a layer that nothing teaches is none to balance
        seen_ahead = [seen._replace(imbalance=None) for seen in seen_ahead]
    hiddens = [output.hidden_BTD, *(hidden_BTD for hidden_BTD, _ in ahead)]
    sums = [
        next_token_sums(
            model,
            hidden_BTD,
            tokens_BT,
            places,
            distance,
            z_weight=objective.z_weight if distance == 1 else 0.0,
            rules=rules,
        )
        for distance, hidden_BTD in enumerate(hiddens, start=1)
    ]
    nats_D = jnp.stack([each.nats for each in sums]) / followed_D[1:]
    losses = Losses(
        next_token=nats_D[0],
        mtp_D=nats_D[1:],
        z=sums[0].z / followed_D[1],
        **_of_layers(model.config, output.observed, seen_ahead, followed_D),
    )
    loads = Loads(
        segments=tuple(tuple(seen.load_E for seen in segment) for segment in output.observed),
        mtp_E=_sum_loads([seen.load_E for seen in seen_ahead]),
    )
    if mtp_weight is None:
        mtp_weight = objective.mtp_weight
    predicting_D = jnp.stack([each.minimised for each in sums]) / followed_D[1:]
    minimised = _weighted(losses, predicting_D, objective, mtp_weight, model.config)
    return minimised, (losses, total(loads, BATCH))


def _weighted(
    losses: Losses,
    predicting_D: jax.Array,
    objective: Objective,
    mtp_weight: jax.Array | float,
    config: Config,
) -> jax.Array:
    """What is minimised.

    Args:
      predicting_D: the loss of the next token and of those further ahead, with a gradient.
    """
    if objective.stage == "warmup":
        return objective.index_weight * losses.indexers
    minimised = predicting_D[0]
    if objective.mtp_depth:
        minimised = minimised + mtp_weight * jnp.mean(predicting_D[1:])
    if objective.balance_weight:
        num_layers = sum(kind.mlp == "moe" for kind in config.layers)
        num_layers += objective.mtp_depth if objective.mtp_weight else 0
        minimised = minimised + objective.balance_weight * num_layers * losses.imbalance
    if objective.teaches_indexers:
        minimised = minimised + objective.index_weight * losses.indexers
    return minimised


class _Seen(NamedTuple):
    """What is kept of a layer's report, or, stacked, of those of a slot."""

    load_E: jax.Array | None
    index_nats: jax.Array | None
    imbalance: jax.Array | None  # times the tokens that counted


def _of_layers(
    config: Config,
    observed: tuple[tuple[_Seen, ...], ...],
    ahead: list[_Seen],
    followed_D: jax.Array,
) -> dict[str, jax.Array]:
    """The losses that layers report, each divided by how many tokens it is about."""
    main = by_layer(config, observed)
    num_main, num_ahead_D = followed_D[0], followed_D[1 : len(ahead) + 1]

    def summed(name: str, of: list[_Seen], axes: Axes) -> jax.Array:
        parts = [getattr(seen, name) for seen in of if getattr(seen, name) is not None]
        return total(jnp.stack(parts), axes) if parts else jnp.zeros(0)

    nats_L, nats_D = (summed("index_nats", of, MESH_AXES) for of in (main, ahead))
    uneven_L, uneven_D = (summed("imbalance", of, BATCH) for of in (main, ahead))
    indexer_L, num_queries = nats_L / num_main, len(main) * num_main
    if ahead:
        num_queries = num_queries + jnp.sum(num_ahead_D)
        mean_D = nats_D / jnp.sum(num_ahead_D)
        indexer_L = jnp.append(indexer_L, jnp.sum(mean_D)) if len(nats_D) else indexer_L
    if len(uneven_D):
        uneven_D = uneven_D / num_ahead_D
    uneven_L = jnp.append(uneven_L / num_main, uneven_D)
    return {
        "indexer_L": indexer_L,
        "indexers": (jnp.sum(nats_L) + jnp.sum(nats_D)) / num_queries,
        "imbalance": jnp.sum(uneven_L) / max(1, len(uneven_L)),
    }


def by_layer(config: Config, observed: tuple[tuple[Any, ...], ...]) -> list[Any]:
    """What `forward` observed, in the order of the layers."""

    def layer(place: LayerPlace) -> Any:
        slot = observed[place.segment][place.slot]
        return jax.tree.map(lambda leaf: leaf[place.group], slot)

    return [layer(place) for place in config.places]


def _count(marked_BT: jax.Array) -> jax.Array:
    """How many are marked on all devices."""
    return total(jnp.sum(marked_BT, dtype=jnp.float32), BATCH)


def _sum_loads(loads: list[jax.Array | None]) -> jax.Array | None:
    """The loads of one layer over its uses; None if it was not used."""
    counted = [load for load in loads if load is not None]
    return jnp.sum(jnp.stack(counted), axis=0) if counted else None
