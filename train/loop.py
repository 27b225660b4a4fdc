"""The steps of a stage, and what is written down of each."""

import contextlib
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax

from glm5_jax.config import Config
from glm5_jax.console import Advance, notice
from glm5_jax.errors import InputError
from glm5_jax.sharding import Partition
from train.evaluation import Evaluation
from train.flops import peak_flops, step_flops
from train.metrics import METRICS_NAME, make_record, require_finite, shown, summary, to_line
from train.optimizer import Recipe
from train.pipeline import Pipeline
from train.placing import next_batch
from train.saver import Saver
from train.sinks import Sinks
from train.stages import Stage
from train.state import TrainState
from train.step import make_step
from train.stopping import Asked

PROFILE_NAME = "profile"


class Part(NamedTuple):
    """A stage with what its steps are made of."""

    stage: Stage
    recipe: Recipe
    pipeline: Pipeline
    evaluation: Evaluation


class Loop(NamedTuple):
    """What the steps of all stages share."""

    config: Config
    run_directory: Path
    partition: Partition
    log: TextIO | None
    sinks: Sinks | None
    saver: Saver
    advance: Advance
    asked: Asked

    def run(self, part: Part, state: TrainState) -> tuple[TrainState, signal.Signals | None]:
        """Takes the steps of a stage that are left, until asked to stop; the state is saved."""
        stage, settings, came = part.stage, part.stage.settings, None
        step = make_step(
            self.config,
            part.recipe,
            self.partition,
            dtype=settings.dtype,
            microbatches=settings.microbatches,
            remat=settings.remat,
        )
        first = int(state.step)
        traced = settings.profiled()
        if first >= traced.start:  # its beginning is over
            traced = range(0)
        tracing = contextlib.ExitStack()
        with tracing, part.pipeline.read(stage.first_row(first)) as rows:
            batch = next_batch(rows, stage.batch_size(first), self.partition)
            for number in range(first + 1, stage.end + 1):
                if number in traced[:1]:
                    jax.profiler.start_trace(str(self.run_directory / PROFILE_NAME))
                    tracing.callback(jax.profiler.stop_trace)
                began = time.perf_counter()
                with jax.set_mesh(self.partition.mesh):
                    state, metrics = step(state, *batch)
                batch_size = stage.batch_size(number - 1)
                # While the devices compute.
                batch = next_batch(rows, stage.batch_size(number), self.partition)
                record = make_record(number, stage, metrics)
                record["tokens"] = stage.tokens(number)
                seconds = time.perf_counter() - began
                record |= self._speed(part, batch_size, seconds)
                if number in traced[-1:]:
                    tracing.close()
                if number == stage.end or number % settings.eval_every == 0:
                    held_out = part.evaluation(state.params)
                    require_finite({"step": number, **held_out}, self.run_directory)
                    record |= held_out
                    notice(summary(record))
                self._write(record)
                trouble = self._judge(stage, number, int(metrics.in_a_row))
                came = self.asked()
                self.saver.check()
                at_last = came or trouble or number == stage.end
                if at_last or number % settings.save_every == 0:
                    self.saver.save(state, stage)
                if trouble:  # the state is as the last step that was taken left it
                    raise InputError(trouble)
                if number == stage.end and metrics.skipped:
                    notice(f"stage {stage.number}: {int(metrics.skipped)} steps were skipped")
                self.advance(1, shown=shown(record))
                if came is not None:
                    break
        return state, came

    def _write(self, record: dict[str, Any]) -> None:
        require_finite(record, self.run_directory)
        if self.log is not None:
            try:
                self.log.write(to_line(record))
                self.log.flush()
            except OSError as error:
                path = self.run_directory / METRICS_NAME
                raise InputError(f"{path}: cannot be written: {error.strerror}") from None
        if self.sinks is not None:
            self.sinks.write(record)

    def _speed(self, part: Part, rows: int, seconds: float) -> dict[str, float]:
        """How fast a step was, whose metrics have arrived; MFU where the device's peak is known."""
        length, num_devices = part.stage.settings.length, self.partition.mesh.size
        speed = rows * length / seconds
        record = {
            "tokens_per_second": round(speed, 1),
            "tokens_per_second_per_device": round(speed / num_devices, 1),
        }
        peak = peak_flops(self.partition.mesh.devices.flat[0], part.stage.settings.dtype)
        if peak is not None:
            flops = step_flops(self.config, part.recipe.objective, rows, length)
            record["mfu"] = round(flops / seconds / (num_devices * peak), 4)
        return record

    def _judge(self, stage: Stage, number: int, in_a_row: int) -> str:
        """What ends the run, if too many steps were skipped."""
        if in_a_row < min(stage.settings.most_skipped, stage.settings.steps):
            return ""
        return (
            f"{self.run_directory}: the loss, the norm of the gradients or that of the weights "
            f"was not finite or far above its mean in {in_a_row} steps in a row, up to step "
            f"{number}, see {METRICS_NAME}; a lower learning_rate may help, or a higher spike, "
            "with --accept-changes"
        )
