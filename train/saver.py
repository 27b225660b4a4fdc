"""Saving while training goes on."""

import concurrent.futures
import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path

import jax
import numpy as np

from glm5_jax.config import Config
from glm5_jax.console import notice
from train import checkpoint
from train.stages import Stage
from train.state import TrainState


class Saver:
    """Saves states of a run one at a time, in the background where that is possible."""

    def __init__(
        self,
        run: Path,
        config: Config,
        text_from: Path,
        stage_ends: Collection[int],
        made_as: str,
    ):
        self._run, self._config, self._text_from = run, config, text_from
        self._stage_ends, self._made_as = stage_ends, made_as
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "saver")
        self._writing: concurrent.futures.Future[None] | None = None

    def save(self, state: TrainState, stage: Stage) -> None:
        """Starts to save a state, once the one before is saved; then it may be donated.

        One process copies it to the host's memory, and writes it while the next steps are taken.
        Several write at once: they hand over their parts in collectives, among which no step may
        come.

        Raises:
          OSError, InputError: this or the one before could not be saved.
        """
        self.wait()
        if jax.process_count() > 1:
            self._write(state, stage)
        else:
            # On CPU the array that numpy is given is the device's own memory.
            host = jax.tree.map(lambda array: np.array(array, copy=True), state)
            self._writing = self._writer.submit(self._write, host, stage)

    def check(self) -> None:
        """Raises the error that the state being saved has met with, if it has."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Waits until all is saved; raises what went wrong with it."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, state: TrainState, stage: Stage) -> None:
        checkpoint.save(self._run, self._config, state, stage, self._text_from, self._made_as)
        checkpoint.remove_old(self._run, stage.settings.keep, self._stage_ends)


@contextlib.contextmanager
def saving(
    run: Path, config: Config, text_from: Path, stage_ends: Collection[int], made_as: str
) -> Iterator[Saver]:
    """Yields what saves states; when the body is left, all of them are saved.

    If the body fails, what it fails of is raised, and an error of saving is shown.
    """
    saver = Saver(run, config, text_from, stage_ends, made_as)
    try:
        yield saver
    except BaseException:
        try:
            saver.wait()
        except Exception as error:
            notice(f"the last checkpoint was not saved: {error}")
        raise
    saver.wait()
