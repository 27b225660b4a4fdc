"""A training run: steps, metrics, evaluation, checkpoints."""

import dataclasses
import json
import time
from pathlib import Path

import jax
from rich.progress import TextColumn

from glm5_jax.atomic import new_directory
from glm5_jax.collectives import BATCH
from glm5_jax.config import Config
from glm5_jax.config_json import config_to_json
from glm5_jax.console import notice, progress
from glm5_jax.coordination import require_same, said_by_all
from glm5_jax.errors import InputError
from glm5_jax.mesh import announcement
from glm5_jax.model import Glm5
from glm5_jax.params import leaves_by_path
from glm5_jax.processes import is_first, on_first
from glm5_jax.sharding import Partition, require_divisible
from glm5_jax.strict_json import read_json
from train import checkpoint
from train.data import Data
from train.evaluation import Evaluation
from train.metrics import (
    METRICS_NAME,
    forget_later_steps,
    make_record,
    require_finite,
    summary,
    to_line,
)
from train.optimizer import Recipe, make_recipe
from train.pipeline import Pipeline
from train.settings import Settings
from train.state import TrainState, abstract_state, start
from train.step import make_step

SETTINGS_NAME = "run.json"
_LONGEST_WAIT = 300  # seconds that processes wait for each other before the first step


def train(
    data: Data,
    config: Config,
    run: Path,
    settings: Settings,
    partition: Partition,
    initial: Path | None = None,
) -> Path:
    """Trains a model, from where the run left off if there is one.

    The mesh and the number of processes may be others each time. The first process writes, on a
    file system that all of them share.

    Args:
      initial: a native checkpoint whose weights a new run starts with; random ones unless given.

    Returns:
      The last checkpoint, a native model directory.

    Raises:
      InputError: data, config and settings do not fit each other, the run was started with other
        settings, processes see different files, or a number of a step is not finite.
    """
    pipeline = Pipeline(data, settings.length, None, settings.seed, at_least=settings.batch_size)
    specs = leaves_by_path(Glm5(config))
    require_divisible(specs, partition.rules, partition.mesh.shape, settings.batch_size)
    _require_fit(data, config, settings, partition)
    recipe = make_recipe(config, settings)
    evaluation = Evaluation(data, config, recipe.objective, settings, partition)
    config = dataclasses.replace(config, eos_ids=(data.end_id,), pad_id=data.end_id)
    params = None
    if initial is not None and not checkpoint.saved(run):
        params = checkpoint.weights(initial, config, partition)
    if is_first():
        _claim(run, config, settings, initial)
    newest = _newest_checkpoint(run, data, config)
    if partition.mesh.size > 1:
        notice(announcement(partition.mesh))
    if newest is None:
        if is_first():
            (run / METRICS_NAME).unlink(missing_ok=True)
        state = start(config, recipe, partition, settings.seed, params)
    else:
        state = _resume(newest, run, config, recipe, partition)
    step = make_step(
        config,
        recipe,
        settings.balance_rate,
        partition,
        dtype=settings.dtype,
        microbatches=settings.microbatches,
        remat=settings.remat,
    )
    with (
        on_first(lambda: (run / METRICS_NAME).open("a")) as log,
        progress(
            "train", settings.steps, TextColumn("{task.fields[shown]}"), shown="compiles"
        ) as advance,
        pipeline.read(int(state.step) * settings.batch_size) as reader,
    ):
        advance(int(state.step))
        while (number := int(state.step)) < settings.steps:
            began = time.perf_counter()
            batch = reader.next(settings.batch_size)
            with jax.set_mesh(partition.mesh):
                state, metrics = step(state, *batch)
            record = make_record(number + 1, metrics, float(recipe.rate(number)))
            seconds = time.perf_counter() - began
            record["tokens_per_second"] = round(batch.tokens_BT.size / seconds, 1)
            is_last = number + 1 == settings.steps
            is_evaluated = is_last or (number + 1) % settings.eval_every == 0
            if is_evaluated:
                record |= evaluation(state.params)
            require_finite(record, run)
            if is_evaluated:
                notice(summary(record))
            if log is not None:
                log.write(to_line(record))
                log.flush()
            if is_last or (number + 1) % settings.save_every == 0:
                newest = checkpoint.save(run, config, state, data.directory, settings.keep)
            shown = f"loss {record['loss']:.3f}, {record['tokens_per_second']:,.0f} tokens/s"
            advance(1, shown=shown)
    assert newest is not None
    return newest


def _require_fit(data: Data, config: Config, settings: Settings, partition: Partition) -> None:
    """Refuses data and settings that are not for a model of the config, on that mesh."""
    rows = settings.batch_size // partition.num_shards(BATCH)
    if rows % settings.microbatches:
        raise InputError(
            f"microbatches is {settings.microbatches}, expected a divisor of the {rows} rows that "
            "each device has of a batch"
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


def _claim(run: Path, config: Config, settings: Settings, initial: Path | None) -> None:
    """Writes down what a run is, or compares it with what was written down."""
    path = run / SETTINGS_NAME
    config_json = config_to_json(config)
    start_json = {"from": None if initial is None else str(initial.resolve())}
    if not run.exists():
        written = {
            "settings": dataclasses.asdict(settings),
            "config": config_json,
            "start": start_json,
        }
        with new_directory(run) as directory:
            text = json.dumps(written, indent=2, allow_nan=False)
            (directory / SETTINGS_NAME).write_text(text + "\n")
        return
    if not path.exists():
        raise InputError(f"{run}: exists already and is not a run, expected a new name")
    found = read_json(path)
    changes = []
    parts = {"settings": settings.lasting(), "config": config_json, "start": start_json}
    for part, wanted in parts.items():
        values = found.get(part)
        if not isinstance(values, dict):
            raise InputError(f"{path}: {part} is {values!r:.80}, expected an object")
        if missing := sorted(wanted.keys() - values.keys()):
            raise InputError(
                f"{path}: {part} has no {', '.join(missing)}: the run was started by another "
                "version, expected a new RUN"
            )
        changes += [
            f"{key} {values.get(key)!r:.80}, not {value!r:.80}"
            for key, value in wanted.items()
            if values.get(key) != value
        ]
    if changes:
        raise InputError(
            f"{path}: the run was started with {'; '.join(changes)}; expected the same"
        )


def _newest_checkpoint(run: Path, data: Data, config: Config) -> Path | None:
    """The checkpoint to go on from, if there is one, once all processes agree on what they see."""
    said_by_all("run is claimed", "", _LONGEST_WAIT)
    checkpoints = checkpoint.saved(run)
    seen = {
        f"{run / SETTINGS_NAME}": "there" if (run / SETTINGS_NAME).exists() else "missing",
        f"the newest checkpoint in {run}": checkpoints[-1].name if checkpoints else "none",
        "the model's config": config,
        f"the digest of {data.directory}": data.digest,
    }
    require_same("run", seen, _LONGEST_WAIT)
    return checkpoints[-1] if checkpoints else None


def _resume(
    newest: Path, run: Path, config: Config, recipe: Recipe, partition: Partition
) -> TrainState:
    notice(f"{run}: goes on from {newest.name}")
    template = abstract_state(config, recipe, partition)
    state = checkpoint.restore(newest, config, partition, template)
    if is_first():
        forget_later_steps(run / METRICS_NAME, int(state.step))
    return state
