"""The records of a run as columns of numbers, few enough to draw."""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import numpy as np

Record = dict[str, Any]

# Of a line; more cannot be told apart in a picture.
_MOST_POINTS = 1500


class Column(NamedTuple):
    """A number by step, nan where it is null."""

    steps_N: np.ndarray
    values_N: np.ndarray

    def smooth(self) -> "Column":
        """The mean of each value and those of the last fiftieth of all before it."""
        width = 1 + len(self.values_N) // 50
        is_known_N = np.isfinite(self.values_N)
        sums_N = _last_sums(np.where(is_known_N, self.values_N, 0), width)
        counts_N = _last_sums(is_known_N, width)
        means_N = np.divide(sums_N, counts_N, out=np.full_like(sums_N, np.nan), where=counts_N > 0)
        return Column(self.steps_N, means_N)

    def thin(self) -> "Column":
        """As few as can be drawn, evenly and with the last."""
        stride = -(-len(self.steps_N) // _MOST_POINTS)
        kept_N = np.arange(len(self.steps_N) - 1, -1, -max(1, stride))[::-1]
        return Column(self.steps_N[kept_N], self.values_N[kept_N])

    def extremes(self) -> "Column":
        """As few as can be drawn: the least and the largest of every part, so no peak is lost."""
        num_parts = _MOST_POINTS // 2
        if len(self.steps_N) <= 2 * num_parts:
            return self
        parts = [
            part_N[np.isfinite(self.values_N[part_N])]
            for part_N in np.array_split(np.arange(len(self.steps_N)), num_parts)
        ]
        ends = [
            (part_N[self.values_N[part_N].argmin()], part_N[self.values_N[part_N].argmax()])
            for part_N in parts
            if len(part_N)
        ]
        kept_N = np.array(ends, dtype=np.int64).reshape(-1)
        return Column(self.steps_N[kept_N], self.values_N[kept_N])


class Span(NamedTuple):
    """Steps of one stage, one after the other."""

    stage: str | None  # what is learnt; None in runs that say nothing of stages
    records: list[Record]


def spans(records: list[Record]) -> list[Span]:
    """Cuts a run at the borders of its stages."""

    def stage(record: Record) -> tuple[Any, Any]:
        return record.get("stage"), record.get("stage_number")

    return [Span(name, list(part)) for (name, _), part in itertools.groupby(records, stage)]


@dataclasses.dataclass(frozen=True)
class History:
    """What is drawn of a run."""

    records: list[Record]
    num_layers: int | None  # of the model without MTP; None if unknown

    @functools.cached_property
    def spans(self) -> list[Span]:
        """The run, stage by stage."""
        return spans(self.records)


def column(records: list[Record], name: str) -> Column:
    """A number of those records that have it."""
    having = [record for record in records if name in record]
    values_N = np.array([record[name] for record in having], np.float64)  # of null it makes nan
    return Column(_steps(having), values_N)


def columns(records: list[Record], name: str) -> list[Column]:
    """A list of numbers, place by place, of those records whose list reaches that far."""
    having = [record for record in records if record.get(name)]
    steps_N = _steps(having)
    lengths_N = np.array([len(record[name]) for record in having], np.int64)
    values_NX = np.full((len(having), lengths_N.max(initial=0)), np.nan)
    for length in set(lengths_N.tolist()):
        rows = [record[name] for record in having if len(record[name]) == length]
        values_NX[lengths_N == length, :length] = np.array(rows, np.float64)
    reaching = [lengths_N > place for place in range(values_NX.shape[1])]
    return [
        Column(steps_N[rows_N], values_NX[rows_N, place]) for place, rows_N in enumerate(reaching)
    ]


def _last_sums(values_N: np.ndarray, width: int) -> np.ndarray:
    """The sum of each value and those before it, so many in all.

    Differences of running sums would lose everything after one value that is huge: here a sum is
    that of the end of one block of values and of the beginning of the next.
    """
    filled = np.pad(values_N.astype(np.float64), (width, -len(values_N) % width))
    blocks_XW = filled.reshape(-1, width)
    beginning = np.cumsum(blocks_XW, axis=1).reshape(-1)
    end = np.cumsum(blocks_XW[:, ::-1], axis=1)[:, ::-1]
    end[:, 0] = 0  # of a whole block, which is the beginning of itself
    last_N = np.arange(width, width + len(values_N))
    return beginning[last_N] + end.reshape(-1)[last_N - width + 1]


def _steps(records: list[Record]) -> np.ndarray:
    return np.array([record["step"] for record in records], np.int64)
