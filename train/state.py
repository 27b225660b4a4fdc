"""What a training run carries from step to step."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from glm5_jax.config import Config
from glm5_jax.model import Glm5
from glm5_jax.params import initialize, leaves_by_path, map_specs
from train.optimizer import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The weights by path, the optimizer's state, and the number of steps taken."""

    step: jax.Array
    params: Params
    optimizer: Any


def start(config: Config, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step."""
    model = initialize(Glm5(config), jax.random.key(seed), std=config.init_std)
    params = leaves_by_path(model)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def assemble(config: Config, params: Params) -> Glm5:
    """The model with the given weights."""
    return map_specs(lambda path, _: params[path], Glm5(config))
