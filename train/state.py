"""What a training run carries from step to step."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from glm5_jax.config import Config
from glm5_jax.mesh import put
from glm5_jax.model import Glm5
from glm5_jax.params import abstract, initialize, leaf_dtype, leaves_by_path, map_specs
from glm5_jax.sharding import Partition
from train.optimizer import Params, Recipe
from train.watch import Watch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The weights by path, and all else that the next step depends on."""

    step: jax.Array  # of the run, from 0
    params: Params
    optimizer: Any
    watch: Watch
    average: Params  # of the weights that are learnt, if one is kept


def start(
    config: Config,
    recipe: Recipe,
    partition: Partition,
    seed: int,
    params: Params | None = None,
) -> TrainState:
    """The state before the first step of a run, on the devices.

    Args:
      seed: of the weights, which do not depend on the mesh.
      params: the weights instead, as the devices keep them.
    """
    blueprint = Glm5(config)

    def draw() -> Params:
        key = jax.random.key(seed)
        return leaves_by_path(initialize(blueprint, key, std=config.init_std))

    if params is None:
        params = jax.jit(draw, out_shardings=leaves_by_path(partition.shardings(blueprint)))()
    step = put(np.zeros((), np.int32), partition.mesh, PartitionSpec())
    return start_stage(step, params, recipe, partition)


def start_stage(
    step: jax.Array, params: Params, recipe: Recipe, partition: Partition
) -> TrainState:
    """The state before the first step of a stage that takes over at that step of the run."""
    with jax.set_mesh(partition.mesh):
        state = jax.jit(functools.partial(_beside, recipe=recipe))(params)
    return TrainState(step, params, *state)


def _beside(params: Params, recipe: Recipe) -> tuple[Any, Watch, Params]:
    """What a stage starts with beside the weights."""
    learnt = {path: params[path] for path in recipe.learnt}
    average = {path: jnp.copy(weight) for path, weight in learnt.items()}
    return recipe.optimizer.init(learnt), Watch.new(), average if recipe.average_decay else {}


def abstract_state(config: Config, recipe: Recipe, partition: Partition) -> TrainState:
    """Shapes, dtypes and shardings of the state."""
    params = leaves_by_path(abstract(Glm5(config), sharding=partition.sharding))

    def on_devices(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = PartitionSpec() if leaf.sharding is None else leaf.sharding.spec
        sharding = NamedSharding(partition.mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    with jax.set_mesh(partition.mesh):
        state = jax.eval_shape(functools.partial(_beside, recipe=recipe), params)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    return jax.tree.map(on_devices, TrainState(step, params, *state))


def assemble(config: Config, params: Params, dtype: jax.typing.DTypeLike = jnp.float32) -> Glm5:
    """The model with the given weights, in a dtype but for those that are pinned to another."""
    return map_specs(
        lambda path, spec: params[path].astype(leaf_dtype(spec, dtype), copy=False), Glm5(config)
    )
