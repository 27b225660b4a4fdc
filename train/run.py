"""A training run: its stages, one after the other, from wherever it was left."""

import contextlib
import dataclasses
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.progress import TextColumn

from glm5_jax.config import Config
from glm5_jax.console import notice, progress
from glm5_jax.errors import InputError
from glm5_jax.mesh import announcement
from glm5_jax.processes import is_first, on_first
from glm5_jax.sharding import Partition
from train import checkpoint
from train.claim import claimed, describe, digest
from train.data import Data
from train.evaluation import Evaluation
from train.fit import require_fit
from train.loop import Loop, Part
from train.metrics import METRICS_NAME
from train.optimizer import make_recipe
from train.pipeline import Pipeline
from train.resume import meet, resume
from train.saver import saving
from train.settings import Settings
from train.sinks import Sinks, open_sinks
from train.stages import Stage, plan_stages
from train.state import start, start_stage
from train.stopping import asked_to_stop

_MOST_STEPS = 2**31  # steps are counted in int32


class Ended(NamedTuple):
    """How a run ended."""

    checkpoint: Path  # the last one, a native model directory
    step: int  # how many were taken in all
    signal: signal.Signals | None  # that it was asked to stop by, if that was before its last step


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
    _require_alike(stages)
    one = stages[0]
    parts = [_prepare(stage, data, config, partition) for stage in plan_stages(stages)]
    _tell(stages)
    config = dataclasses.replace(config, eos_ids=(data.end_id,), pad_id=data.end_id)
    params = None
    if initial is not None and not checkpoint.saved(run):
        params = checkpoint.weights(initial, config, partition)
    description = describe(config, stages, data.digest, initial)
    made_as = digest(description)
    with contextlib.ExitStack() as stack:
        claim = on_first(lambda: claimed(run, description, accept_changes))
        write_down = stack.enter_context(claim)
        meet(run, data, config)
        if partition.mesh.size > 1:
            notice(announcement(partition.mesh))
        state = resume(run, config, parts, partition, made_as)
        if write_down is not None:
            write_down()
        if state is None:
            if is_first():
                (run / METRICS_NAME).unlink(missing_ok=True)
            state = start(config, parts[0].recipe, partition, stages[0].seed, params)

        def sinks_of_run() -> contextlib.AbstractContextManager[Sinks]:
            return open_sinks(run, one.tensorboard, one.wandb or None, description)

        ends = {part.stage.end for part in parts}
        log = stack.enter_context(on_first(lambda: (run / METRICS_NAME).open("a")))
        sinks = stack.enter_context(on_first(sinks_of_run))
        asked = stack.enter_context(asked_to_stop(partition.mesh))
        saver = stack.enter_context(saving(run, config, data.directory, ends, made_as))
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
        last = int(state.step)
        return Ended(checkpoint.path_of(run, last), last, came if last < max(ends) else None)


def _prepare(stage: Stage, data: Data, config: Config, partition: Partition) -> Part:
    """A stage ready to be run.

    Raises:
      InputError: data and settings are not for a model of the config, on that mesh.
    """
    settings = stage.settings
    require_fit(config, settings, partition.mesh.shape)
    if data.vocab_size > config.vocab_size:
        raise InputError(
            f"{data.directory}: has {data.vocab_size} tokens, expected at most the config's "
            f"vocab_size {config.vocab_size}; prepare takes --vocab-size"
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


def _require_alike(stages: Sequence[Settings]) -> None:
    """Raises `InputError` where stages differ in what is one thing for a whole run."""
    for name in ("tensorboard", "wandb", "profile"):
        values = {getattr(settings, name) for settings in stages}
        if len(values) > 1:
            raise InputError(f"{name} differs between stages, expected one for the run")
    steps = sum(settings.steps for settings in stages)
    if steps >= _MOST_STEPS:
        raise InputError(f"steps are {steps} in all, expected less than {_MOST_STEPS}")
    profiled = stages[0].profiled()
    if profiled and profiled[-1] > steps:
        raise InputError(f"profile is {stages[0].profile}, expected steps up to {steps}")


def _tell(stages: Sequence[Settings]) -> None:
    """Tells what is allowed and seldom meant."""
    for number, settings in enumerate(stages, start=1):
        if settings.warmup_steps >= settings.steps:
            notice(
                f"stage {number}: warmup_steps is {settings.warmup_steps} and steps "
                f"{settings.steps}: the learning rate rises to the end, and does not fall"
            )
