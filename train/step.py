"""One step of training."""

import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec, reshard
from jax.typing import ArrayLike

from glm5_jax.collectives import alike
from glm5_jax.config import Config
from glm5_jax.model import Glm5
from glm5_jax.params import leaves_by_path
from glm5_jax.places import Places
from glm5_jax.segment import Remat
from glm5_jax.sharding import ROWS, Partition
from train.loss import Loads, Losses, count_followed, loss
from train.optimizer import Params, Recipe, balance
from train.state import TrainState, assemble


class Metrics(NamedTuple):
    """What is reported of a step."""

    losses: Losses
    gradient_norm: jax.Array  # before clipping
    weight_norm: jax.Array  # after the step
    rate: jax.Array  # of learning
    is_taken: jax.Array  # not, where a step would do harm: the weights are then as before it
    in_a_row: jax.Array  # steps, this one the last, that were not taken
    skipped: jax.Array  # of the stage, in all
    imbalance: jax.Array  # the largest load of an expert over the mean of its layer


class Step(Protocol):
    """A compiled step. It must be called within `jax.set_mesh`."""

    def __call__(
        self, state: TrainState, tokens_BT: ArrayLike, segment_BT: ArrayLike
    ) -> tuple[TrainState, Metrics]:
        """Learns from a whole batch; the state given is used up."""


def make_step(
    config: Config,
    recipe: Recipe,
    partition: Partition,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    microbatches: int = 1,
    remat: Remat = "none",
) -> Step:
    """Compiles a step.

    Gradients are taken by every device on its shards, of the weights that are learnt; the
    optimizer is given the whole arrays. A step that the watch finds unusual, or after which the
    weights would have no norm, changes nothing but the watch and the number of the step.

    Args:
      dtype: that gradients are computed in, and summed over devices; weights, the optimizer and
        sums over microbatches stay in float32.
      microbatches: parts of a batch, one after the other, whose gradients are added up; each
        device's rows are divided by it.
    """
    objective, optimizer = recipe.objective, recipe.optimizer
    attending = objective.attending(config)

    def gradient_of(
        learnt: Params,
        kept: Params,
        mtp_weight: jax.Array,
        tokens_BT: jax.Array,
        segment_BT: jax.Array,
    ) -> tuple[Params, tuple[Losses, Loads]]:
        followed_D = count_followed(Places.packed(segment_BT), objective.mtp_depth)

        def part_loss(
            learnt: Params, tokens_BT: jax.Array, segment_BT: jax.Array
        ) -> tuple[jax.Array, tuple[Losses, Loads]]:
            model = assemble(attending, learnt | kept, dtype)
            places = Places.packed(segment_BT)
            return loss(
                model,
                tokens_BT,
                places,
                objective,
                followed_D,
                mtp_weight=mtp_weight,
                rules=partition.rules,
                remat=remat,
            )

        take = jax.grad(part_loss, has_aux=True)
        if microbatches == 1:
            return take(learnt, tokens_BT, segment_BT)

        def add(so_far: Any, rows: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, so_far, take(learnt, *rows)), None

        parts = jax.tree.map(
            lambda each: each.reshape(microbatches, -1, each.shape[-1]), (tokens_BT, segment_BT)
        )
        _, shapes = jax.eval_shape(take, learnt, *(each[0] for each in parts))
        nothing = (
            jax.tree.map(lambda weight: alike(jnp.zeros_like(weight), weight)[0], learnt),
            jax.tree.map(lambda each: jnp.zeros(each.shape, each.dtype), shapes),
        )
        return jax.lax.scan(add, nothing, parts)[0]

    specs, equal = leaves_by_path(partition.specs(Glm5(config))), PartitionSpec()
    learnt_specs = {path: specs[path] for path in recipe.learnt}
    kept_specs = {path: spec for path, spec in specs.items() if path not in learnt_specs}
    rows = NamedSharding(partition.mesh, ROWS)
    gradient = partition.on_shards(
        gradient_of,
        (learnt_specs, kept_specs, equal, ROWS, ROWS),
        (learnt_specs, equal),
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(
        state: TrainState, tokens_BT: jax.Array, segment_BT: jax.Array
    ) -> tuple[TrainState, Metrics]:
        learnt = {path: state.params[path] for path in learnt_specs}
        kept = {path: state.params[path] for path in kept_specs}
        taken = state.watch.taken
        tokens_BT, segment_BT = (reshard(each, rows) for each in (tokens_BT, segment_BT))
        gradients, (losses, loads) = gradient(
            learnt, kept, recipe.mtp_weight(taken), tokens_BT, segment_BT
        )
        # Not the whole that is minimised, which rises when a schedule weighs a part more.
        judged = losses.indexers if objective.stage == "warmup" else losses.next_token
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, learnt)
        moved = optax.apply_updates(learnt, updates)
        params = balance(kept | moved, loads, objective, recipe.balance_rate(taken))
        average = {
            path: weight + (1 - recipe.average_decay) * (moved[path] - weight)
            for path, weight in state.average.items()
        }
        gradient_norm = optax.tree.norm(gradients)
        is_taken = state.watch.is_usual(judged, gradient_norm, recipe.spike)
        is_taken &= jnp.isfinite(optax.tree.norm(params))
        params, optimizer_state, average = jax.tree.map(
            lambda after, before: jnp.where(is_taken, after, before),
            (params, optimizer_state, average),
            (state.params, state.optimizer, state.average),
        )
        watch = state.watch.after(judged, gradient_norm, is_taken)
        metrics = Metrics(
            losses=losses,
            gradient_norm=gradient_norm,
            weight_norm=optax.tree.norm(params),
            rate=recipe.rate(taken),
            is_taken=is_taken,
            in_a_row=watch.in_a_row,
            skipped=watch.skipped,
            imbalance=_imbalance(loads),
        )
        return TrainState(state.step + 1, params, optimizer_state, watch, average), metrics

    return step


def _imbalance(loads: Loads) -> jax.Array:
    layers = [load.astype(jnp.float32) for load in jax.tree.leaves(loads)]
    if not layers:
        return jnp.ones(())
    ratios = [jnp.max(jnp.max(load, -1) / jnp.mean(load, -1)) for load in layers]
    return jnp.max(jnp.stack(ratios))
