"""A training run: steps, metrics, evaluation, checkpoints."""

import dataclasses
import functools
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.progress import TextColumn

from glm5_jax.atomic import new_directory, new_file
from glm5_jax.config import Config
from glm5_jax.config_json import config_to_json
from glm5_jax.console import notice, progress
from glm5_jax.errors import InputError
from glm5_jax.model import Glm5
from glm5_jax.params import leaves_by_path
from glm5_jax.strict_json import parse_json, read_json
from train import checkpoint
from train.data import Data
from train.loss import Objective
from train.optimizer import Params, learning_rate, make_optimizer
from train.settings import Settings
from train.state import TrainState, start
from train.step import Metrics, make_evaluation, make_step

METRICS_NAME = "metrics.jsonl"
SETTINGS_NAME = "run.json"


def train(data: Data, config: Config, run: Path, settings: Settings) -> Path:
    """Trains a model, from where the run left off if there is one.

    Returns:
      The last checkpoint, a native model directory.

    Raises:
      InputError: data and config do not fit each other, the run was started with other settings,
        or the loss is not finite.
    """
    if data.vocab_size > config.vocab_size:
        raise InputError(
            f"{data.directory}: has {data.vocab_size} tokens, expected at most the config's "
            f"vocab_size {config.vocab_size}"
        )
    config = dataclasses.replace(config, eos_ids=(data.end_id,), pad_id=data.end_id)
    rows = data.split("train", settings.length, at_least=settings.batch_size)
    evaluation = _Evaluation(data, config, settings)
    rate = learning_rate(
        settings.learning_rate,
        settings.final_learning_rate,
        settings.warmup_steps,
        settings.steps,
    )
    specs = leaves_by_path(Glm5(config))
    optimizer = make_optimizer(specs, rate, settings.weight_decay, settings.clip)
    _claim(run, config, settings)
    state = _start_or_resume(run, config, optimizer, settings)
    step = make_step(
        config, _objective(settings), optimizer, settings.balance_rate, remat=settings.remat
    )
    with (
        (run / METRICS_NAME).open("a") as log,
        progress("train", settings.steps, TextColumn("{task.fields[shown]}")) as advance,
    ):
        advance(int(state.step), shown="")
        while (number := int(state.step)) < settings.steps:
            began = time.perf_counter()
            batch = rows.batch(number, settings.batch_size, settings.seed)
            state, metrics = step(state, *map(jnp.asarray, batch))
            record = _record(number + 1, metrics, float(rate(number)))
            seconds = time.perf_counter() - began
            record["tokens_per_second"] = round(batch.tokens_BT.size / seconds, 1)
            if not math.isfinite(record["loss"]):
                raise InputError(
                    f"{run}: the loss of step {number + 1} is {record['loss']}; a lower learning "
                    "rate may help"
                )
            is_last = number + 1 == settings.steps
            if is_last or (number + 1) % settings.eval_every == 0:
                record |= evaluation(state.params)
                notice(_summary(record))
            log.write(json.dumps(record) + "\n")
            log.flush()
            if is_last or (number + 1) % settings.save_every == 0:
                checkpoint.save(run, config, state, data.directory, settings.keep)
            shown = f"loss {record['loss']:.3f}, {record['tokens_per_second']:,.0f} tokens/s"
            advance(1, shown=shown)
    return checkpoint.saved(run)[-1]


def _objective(settings: Settings) -> Objective:
    return Objective(
        mtp_depth=settings.mtp_depth,
        mtp_weight=settings.mtp_weight,
        index_weight=settings.index_weight,
    )


class _Evaluation:
    """The loss of held-out text."""

    def __init__(self, data: Data, config: Config, settings: Settings):
        self._rows = data.split("held_out", settings.length, at_least=1)
        self._num_rows = min(settings.eval_rows, self._rows.num_rows)
        self._bytes_per_token = data.bytes_per_token("held_out")
        self._evaluate = make_evaluation(config, _objective(settings))
        self._batch_size = min(settings.batch_size, self._num_rows)

    def __call__(self, params: Params) -> dict[str, float]:
        """Nats per token, and bits per byte of text, which no tokenizer changes."""
        losses = []
        for first in range(0, self._num_rows - self._batch_size + 1, self._batch_size):
            batch = self._rows.rows(range(first, first + self._batch_size))
            losses.append(float(self._evaluate(params, *map(jnp.asarray, batch)).next_token))
        mean = sum(losses) / len(losses)
        bits = mean / math.log(2) / self._bytes_per_token
        return {"held_out_loss": mean, "bits_per_byte": bits}


def _claim(run: Path, config: Config, settings: Settings) -> None:
    """Writes down what a run is, or compares it with what was written down."""
    wanted = {"settings": dataclasses.asdict(settings), "config": config_to_json(config)}
    path = run / SETTINGS_NAME
    if not run.exists():
        with new_directory(run) as directory:
            (directory / SETTINGS_NAME).write_text(json.dumps(wanted, indent=2) + "\n")
        return
    if not path.exists():
        raise InputError(f"{run}: exists already and is not a run, expected a new name")
    found = read_json(path)
    for part, values in wanted.items():
        for key, value in values.items():
            before = found.get(part, {}).get(key)
            if before != value:
                raise InputError(
                    f"{run}: was started with {key} {before!r:.80}, expected the same and not "
                    f"{value!r:.80}"
                )


def _start_or_resume(
    run: Path, config: Config, optimizer: optax.GradientTransformation, settings: Settings
) -> TrainState:
    begin = functools.partial(start, config, optimizer, settings.seed)
    checkpoints = checkpoint.saved(run)
    if not checkpoints:
        (run / METRICS_NAME).unlink(missing_ok=True)
        return jax.jit(begin)()
    notice(f"{run}: goes on from {checkpoints[-1].name}")
    state = checkpoint.restore(checkpoints[-1], config, jax.eval_shape(begin))
    _forget_later_steps(run / METRICS_NAME, int(state.step))
    return state


def _forget_later_steps(path: Path, last: int) -> None:
    """Drops the metrics of steps that will be taken again."""
    kept = [record for record in read_metrics(path) if record["step"] <= last]
    with new_file(path, overwrite=True) as partial:
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; a last line that was cut off is left out.

    Raises:
      InputError: there is no such file.
    """
    try:
        lines = path.read_text().split("\n")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    return [parse_json(line, str(path)) for line in lines[:-1]]


def _record(step: int, metrics: Metrics, rate: float) -> dict[str, Any]:
    losses = metrics.losses
    return {
        "step": step,
        "loss": float(losses.next_token),
        "mtp_losses": [float(value) for value in losses.mtp_D],
        "index_loss": float(losses.indexers),
        "learning_rate": rate,
        "gradient_norm": float(metrics.gradient_norm),
        "imbalance": float(metrics.imbalance),
    }


def _summary(record: dict[str, Any]) -> str:
    ahead = "".join(f", mtp {value:.3f}" for value in record["mtp_losses"])
    return (
        f"step {record['step']}: loss {record['loss']:.3f}{ahead}, held out "
        f"{record['held_out_loss']:.3f}, {record['bits_per_byte']:.3f} bits per byte, "
        f"{record['tokens_per_second']:,.0f} tokens/s"
    )
