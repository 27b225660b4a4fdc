"""The training step, for plans to compile."""

import jax
import jax.numpy as jnp

from glm5_jax.config import Config
from glm5_jax.plan.programs import Job, Program, Work, loop_trips
from glm5_jax.sharding import TRAIN, Partition
from train.optimizer import make_recipe
from train.settings import Settings
from train.state import abstract_state
from train.step import make_step


def program(
    config: Config, partition: Partition, work: Work, settings: Settings | None = None
) -> Program:
    """A step of `glm5-train run`, by default with its default settings, layers rematerialised."""
    if settings is None:
        settings = Settings(
            mtp_depth=min(Settings.mtp_depth, config.num_mtp_layers),
            dtype=work.dtype or Settings.dtype,
            remat="layers",
        )
    recipe = make_recipe(config, settings)
    state = abstract_state(config, recipe, partition)
    rows_BT = jax.ShapeDtypeStruct((work.batch, work.context), jnp.int32)
    num_tokens = work.batch * work.context
    step = make_step(
        config,
        recipe,
        partition,
        dtype=settings.dtype,
        microbatches=settings.microbatches,
        remat=settings.remat,
    )
    return Program(
        step,
        (state, rows_BT, rows_BT),
        {"weights": state.params, "optimizer": state.optimizer, "average": state.average},
        num_tokens,
        loop_trips(config, partition, num_tokens // settings.microbatches),
    )


JOB = Job(TRAIN, program)
