"""Where in a run each of its stages lies, and which rows of the data a step reads."""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

from train.settings import Settings


class Stage(NamedTuple):
    """A stage of a run. Steps are numbered through the whole run, from 0."""

    number: int  # from 1
    settings: Settings
    first: int  # step
    first_token: int  # how many the stages before it read

    @property
    def end(self) -> int:
        """The step after the last."""
        return self.first + self.settings.steps

    def batch_size(self, step: int) -> int:
        """Rows of a step: in the warm-up of the batch size, more and more."""
        return _batch_size(self.settings, step - self.first)

    def first_row(self, step: int) -> int:
        """The first row that a step reads; a stage goes on where the one before it stopped.

        Rows are numbered through all epochs, in rows of the stage's length. Stages that differ in
        length, seed or mixture have their rows in orders of their own.
        """
        return self.first_token // self.settings.length + _rows(self.settings, step - self.first)

    def tokens(self, step: int) -> int:
        """How many tokens the run has read before a step."""
        return self.first_token + _rows(self.settings, step - self.first) * self.settings.length


def plan_stages(all_settings: Sequence[Settings]) -> list[Stage]:
    """The stages of a run, one after the other."""
    stages: list[Stage] = []
    first, first_token = 0, 0
    for number, settings in enumerate(all_settings, start=1):
        stages.append(Stage(number, settings, first, first_token))
        first += settings.steps
        first_token = stages[-1].tokens(first)
    return stages


def batch_sizes(settings: Settings) -> list[int]:
    """The sizes that batches of a stage have, rising."""
    doublings = (settings.batch_size // settings.smallest_batch).bit_length() - 1
    return [settings.smallest_batch << number for number in range(doublings + 1)]


def _first_steps(settings: Settings) -> list[int]:
    """For each of `batch_sizes` the first step that has it, or would, in a short warm-up."""
    doublings = len(batch_sizes(settings)) - 1
    return [
        -(-number * settings.batch_warmup_steps // max(1, doublings))
        for number in range(doublings + 1)
    ]


def _batch_size(settings: Settings, step: int) -> int:
    return batch_sizes(settings)[bisect.bisect_right(_first_steps(settings), step) - 1]


def _rows(settings: Settings, steps: int) -> int:
    """How many rows the first steps of a stage read."""
    firsts = [min(first, steps) for first in _first_steps(settings)]
    ends = [*firsts[1:], steps]
    return sum(
        size * (end - first)
        for size, first, end in zip(batch_sizes(settings), firsts, ends, strict=True)
    )
