"""A training run: its stages, one after the other, from wherever it was left."""

import contextlib
import dataclasses
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import TextColumn

from glm5_jax.collectives import BATCH
from glm5_jax.config import Config
from glm5_jax.console import notice, progress
from glm5_jax.coordination import require_same, said_by_all
from glm5_jax.errors import InputError
from glm5_jax.mesh import announcement
from glm5_jax.model import Glm5
from glm5_jax.params import leaves_by_path
from glm5_jax.processes import is_first, on_first
from glm5_jax.sharding import Partition, require_divisible
from train import checkpoint
from train.claim import RUN_NAME, claimed, describe
from train.data import Data
from train.evaluation import Evaluation
from train.loop import Loop, Part
from train.metrics import METRICS_NAME, forget_later_steps
from train.optimizer import make_recipe
from train.pipeline import Pipeline
from train.saver import saving
from train.settings import Settings
from train.sinks import Sinks, open_sinks
from train.stages import Stage, batch_sizes, plan_stages
from train.state import TrainState, abstract_state, start, start_stage
from train.stopping import asked_to_stop

_LONGEST_WAIT = 300  # seconds that processes wait for each other before the first step


class Ended(NamedTuple):
    """How a run ended."""

    checkpoint: Path  # the last one, a native model directory
    step: int  # how many were taken in all
    signal: signal.Signals | None  # that it was asked to stop by, before its last step


def train(
    data: Data,
    config: Config,
    run: Path,
    stages: Sequence[Settings],
    partition: Partition,
    initial: Path | None = None,
    *,
    accept_changes: bool = False,
) -> Ended:
    """Trains a model, from where the run left off if there is one.

    The mesh and the number of processes may be others each time. The first process writes, on a
    file system that all of them share.

    Args:
      initial: a native checkpoint whose weights a new run starts with; random ones unless given.
      accept_changes: go on with another config, other settings or data than it was started with.

    Raises:
      InputError: data, config and settings do not fit each other, the run was started with others,
        processes see different files, or too many steps are skipped.
    """
    parts = [_prepare(stage, data, config, partition) for stage in plan_stages(stages)]
    config = dataclasses.replace(config, eos_ids=(data.end_id,), pad_id=data.end_id)
    params = None
    if initial is not None and not checkpoint.saved(run):
        params = checkpoint.weights(initial, config, partition)
    description = describe(config, stages, data.digest, initial)
    with contextlib.ExitStack() as stack:
        if is_first():
            stack.enter_context(claimed(run, description, accept_changes))
        _meet(run, data, config)
        if partition.mesh.size > 1:
            notice(announcement(partition.mesh))
        state = _resume(run, config, parts, partition)
        if state is None:
            if is_first():
                (run / METRICS_NAME).unlink(missing_ok=True)
            state = start(config, parts[0].recipe, partition, stages[0].seed, params)
        ends = {part.stage.end for part in parts}
        log = stack.enter_context(on_first(lambda: (run / METRICS_NAME).open("a")))
        sinks = stack.enter_context(on_first(lambda: _sinks(run, description)))
        asked = stack.enter_context(asked_to_stop(partition.mesh))
        saver = stack.enter_context(saving(run, config, data.directory, ends))
        bar = progress("train", max(ends), TextColumn("{task.fields[shown]}"), shown="compiles")
        advance = stack.enter_context(bar)
        advance(int(state.step))
        loop = Loop(config, run, partition, log, sinks, saver, advance, asked)
        came = None
        for part in parts:
            if came is None and int(state.step) < part.stage.end:
                if int(state.step) == part.stage.first > 0:
                    notice(f"stage {part.stage.number}: {part.stage.settings.stage}")
                    state = start_stage(state.step, state.params, part.recipe, partition)
                state, came = loop.run(part, state)
        saver.wait()
        return Ended(checkpoint.path_of(run, int(state.step)), int(state.step), came)


def _prepare(stage: Stage, data: Data, config: Config, partition: Partition) -> Part:
    """A stage ready to be run.

    Raises:
      InputError: data and settings are not for a model of the config, on that mesh.
    """
    settings = stage.settings
    specs = leaves_by_path(Glm5(config))
    for size in batch_sizes(settings):
        require_divisible(specs, partition.rules, partition.mesh.shape, size)
        rows = size // partition.num_shards(BATCH)
        if rows % settings.microbatches:
            raise InputError(
                f"microbatches is {settings.microbatches}, expected a divisor of the {rows} rows "
                "that each device has of a batch"
            )
    if data.vocab_size > config.vocab_size:
        raise InputError(
            f"{data.directory}: has {data.vocab_size} tokens, expected at most the config's "
            f"vocab_size {config.vocab_size}; prepare takes --vocab-size"
        )
    if settings.mtp_depth > 0 and config.num_mtp_layers == 0:
        raise InputError(
            f"mtp_depth is {settings.mtp_depth}, expected 0: the config's "
            "num_nextn_predict_layers is 0"
        )
    if settings.length > config.max_positions:
        raise InputError(
            f"length is {settings.length}, expected at most the config's max_position_embeddings "
            f"{config.max_positions}"
        )
    pipeline = Pipeline(
        data,
        settings.length,
        settings.mixture_weights(),
        settings.seed,
        at_least=settings.batch_size,
    )
    recipe = make_recipe(config, settings)
    evaluation = Evaluation(data, config, recipe.objective, settings, partition)
    return Part(stage, recipe, pipeline, evaluation)


def _sinks(run: Path, description: dict[str, Any]) -> contextlib.AbstractContextManager[Sinks]:
    """Where numbers go beside the metrics file: wherever a stage says."""
    stages = description["stages"]
    projects = [stage["wandb"] for stage in stages if stage["wandb"]]
    any_tensorboard = any(stage["tensorboard"] for stage in stages)
    return open_sinks(run, any_tensorboard, projects[0] if projects else None, description)


def _meet(run: Path, data: Data, config: Config) -> None:
    """Returns once the run is claimed, and all processes agree on what they see."""
    said_by_all("run is claimed", "", _LONGEST_WAIT)
    saved = checkpoint.saved(run)
    seen = {
        f"{run / RUN_NAME}": "there" if (run / RUN_NAME).exists() else "missing",
        f"the newest checkpoint in {run}": saved[-1].name if saved else "none",
        "the model's config": config,
        f"the digest of {data.directory}": data.digest,
    }
    require_same("run", seen, _LONGEST_WAIT)


def _resume(
    run: Path, config: Config, parts: Sequence[Part], partition: Partition
) -> TrainState | None:
    """The state of the newest checkpoint that is whole; None if there is no checkpoint.

    Those that are damaged are named, and put aside once another is found to go on from.

    Raises:
      InputError: all are damaged, or the newest is beyond the last step.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(checkpoint.saved(run)):
        state, trouble = _try_to_restore(path, config, parts, partition)
        told = said_by_all(f"restored {path.name}", trouble, _LONGEST_WAIT)
        if state is not None and not any(told):
            for bad, why in damaged.items():
                notice(f"{why}; the one before it is used")
                if is_first():
                    bad.rename(bad.with_name(f"damaged-{bad.name}"))
            notice(f"{run}: goes on from {path.name}")
            if is_first():
                forget_later_steps(run / METRICS_NAME, int(state.step))
            return state
        damaged[path] = next(filter(None, told))
    if damaged:
        raise InputError(next(iter(damaged.values())))
    return None


def _try_to_restore(
    path: Path, config: Config, parts: Sequence[Part], partition: Partition
) -> tuple[TrainState | None, str]:
    """The state of a checkpoint, or what is wrong with it."""
    step = checkpoint.step_of(path)
    for part in parts:
        if part.stage.first < step <= part.stage.end:
            template = abstract_state(config, part.recipe, partition)
            try:
                return checkpoint.restore(path, config, partition, template), ""
            except (InputError, OSError) as error:
                return None, str(error)
    return None, f"{path}: is of step {step}, expected one of the run's {parts[-1].stage.end}"
