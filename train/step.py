"""One step of training."""

import functools
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from glm5_jax.collectives import BATCH, share
from glm5_jax.config import Config
from glm5_jax.model import Glm5
from glm5_jax.params import leaves_by_path
from glm5_jax.places import Places
from glm5_jax.sharding import Partition
from train.loss import Loads, Losses, Objective, loss
from train.optimizer import Params, balance
from train.state import TrainState, assemble


class Metrics(NamedTuple):
    """What is reported of a step."""

    losses: Losses
    gradient_norm: jax.Array  # before clipping
    weight_norm: jax.Array  # after the step
    imbalance: jax.Array  # the largest load of an expert over the mean of its layer


class Step(Protocol):
    """A compiled step. It must be called within `jax.set_mesh`."""

    def __call__(
        self, state: TrainState, tokens_BT: np.ndarray, segment_BT: np.ndarray
    ) -> tuple[TrainState, Metrics]:
        """Learns from a whole batch; the state given is used up."""


def make_step(
    config: Config,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    balance_rate: float,
    partition: Partition,
    *,
    remat: bool,
) -> Step:
    """Compiles a step.

    Gradients are taken by every device on its shards; the optimizer, which works elementwise, sees
    the whole arrays.
    """

    def total_loss(
        params: Params, tokens_BT: jax.Array, segment_BT: jax.Array
    ) -> tuple[jax.Array, tuple[Losses, Loads]]:
        tokens_BT, segment_BT = (share(each, BATCH, 0) for each in (tokens_BT, segment_BT))
        model, places = assemble(config, params), Places.packed(segment_BT)
        return loss(model, tokens_BT, places, objective, rules=partition.rules, remat=remat)

    specs, equal = leaves_by_path(partition.specs(Glm5(config))), PartitionSpec()
    gradient = partition.on_shards(
        jax.grad(total_loss, has_aux=True), (specs, equal, equal), (specs, equal)
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(
        state: TrainState, tokens_BT: jax.Array, segment_BT: jax.Array
    ) -> tuple[TrainState, Metrics]:
        gradients, (losses, loads) = gradient(state.params, tokens_BT, segment_BT)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        params = balance(params, loads, objective, balance_rate)
        metrics = Metrics(
            losses, optax.tree.norm(gradients), optax.tree.norm(params), _imbalance(loads)
        )
        return TrainState(state.step + 1, params, optimizer_state), metrics

    return step


def _imbalance(loads: Loads) -> jax.Array:
    layers = [load for load in jax.tree.leaves(loads) if load is not None]
    if not layers:
        return jnp.ones(())
    ratios = [
        jnp.max(jnp.max(load, -1) / jnp.mean(load.astype(jnp.float32), -1)) for load in layers
    ]
    return jnp.max(jnp.stack(ratios))
