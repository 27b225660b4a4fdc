"""Rows of several sources in an endless order: a row is a function of its number alone."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

from glm5_jax.errors import InputError
from train.data import Batch, Data, pack

try:
    import grain
except ImportError:
    raise InputError("training needs the package grain: pip install 'glm5-jax[train]'") from None

_ALL = slice(None)
_END = 2**62  # more rows than anyone will read
# Batches are read ahead by threads; reading from a disk leaves Python to the others.
_READ_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


class Pipeline:
    """The rows to train on, shuffled anew in every epoch, sources mixed by weight."""

    def __init__(
        self,
        data: Data,
        length: int,
        mixture: Mapping[str, float] | None,
        seed: int,
        at_least: int = 1,
    ):
        """Takes rows of `length` tokens.

        Args:
          mixture: weights of sources, of which those that are not named have none; without it,
            each source has as much weight as it has rows, so that every row is seen once per epoch.
          seed: of the order, less than 2**32.
          at_least: rows that there have to be.

        Raises:
          InputError: the mixture does not fit the sources, or there are too few rows.
        """
        sources = data.sources if mixture is None else _weighted(data, mixture)
        splits = {name: data.split("train", length, source=name) for name in sources}
        self.num_rows = sum(split.num_rows for split in splits.values())
        if self.num_rows < at_least:
            raise InputError(
                f"{data.directory}: has {self.num_rows} rows of tokens to train on, expected at "
                f"least {at_least} x {length} tokens"
            )
        self._end_id = data.end_id
        shuffled = [
            grain.MapDataset.range(split.num_rows)
            .shuffle(seed=_seed_of(seed, name))
            .repeat()
            .map(split.row)
            for name, split in splits.items()
        ]
        weights = mixture or {name: split.num_rows for name, split in splits.items()}
        mixed = _Mixed([Fraction(weights[name]) for name in sources])
        self._rows = grain.MapDataset.select_from_datasets(shuffled, mixed)

    def batch(self, first_row: int, size: int, part: slice = _ALL) -> Batch:
        """The rows from a number on, or a part of these, all of it read now."""
        numbers = range(first_row, first_row + size)[part]
        return pack([self._rows[number] for number in numbers], self._end_id)

    @contextmanager
    def read(self, first_row: int) -> Iterator["Reader"]:
        """Opens a reader of the rows from a number on."""
        reader = Reader(self, first_row)
        try:
            yield reader
        finally:
            reader.close()


class Reader:
    """Reads batch after batch, ahead of what is asked for; `Pipeline.read` opens one."""

    def __init__(self, pipeline: Pipeline, first_row: int):
        self._pipeline = pipeline
        self._next_row = first_row
        self._shape: tuple[int, slice] | None = None  # that batches are read ahead in
        self._batches: Any = None

    def next(self, size: int, part: slice = _ALL) -> Batch:
        """The next rows, or a part of these: what `Pipeline.batch` gives.

        What was read ahead is of use if size and part are those of the last call.
        """
        if self._shape != (size, part):
            self.close()
            first_rows = grain.MapDataset.range(self._next_row, _END, size)
            batches = first_rows.map(lambda row: self._pipeline.batch(row, size, part))
            self._batches = iter(batches.to_iter_dataset(_READ_AHEAD))
            self._shape = (size, part)
        self._next_row += size
        return next(self._batches)

    def close(self) -> None:
        """Ends reading ahead."""
        if self._batches is not None:
            self._batches.close()


class _Mixed(grain.transforms.DatasetSelectionMap):
    """Spreads the rows of sources evenly: of any number of rows from the first on, each source has
    its part, rounded. `MapDataset.mix` rounds the weights, too, to hundredths of the least."""

    def __init__(self, weights: list[Fraction]):
        common = math.lcm(*(weight.denominator for weight in weights))
        self._shares = [int(weight * common) for weight in weights]

    def __len__(self) -> int:
        return _END

    def __getitem__(self, index: int) -> tuple[int, int]:
        """The source of a row, and how many rows that source has before."""
        left, before = sum(self._shares), index  # of this source and those after it
        for number, share in enumerate(self._shares):
            later, then = (rows * (left - share) // left for rows in (before, before + 1))
            if later == then:
                return number, before - later
            left, before = left - share, later
        raise AssertionError("the last source has all that is left")


def _weighted(data: Data, mixture: Mapping[str, float]) -> list[str]:
    """The sources of a mixture that have weight."""
    expected = f"expected weights of the sources {', '.join(data.sources)} of {data.directory}"
    for name, weight in mixture.items():
        if name not in data.sources:
            raise InputError(f"mixture names {name!r:.80}, {expected}")
        if not 0 <= weight < math.inf:
            raise InputError(f"mixture gives {name} the weight {weight}, {expected}, 0 or more")
    names = [name for name in data.sources if mixture.get(name, 0)]
    if not names:
        raise InputError(f"mixture is {dict(mixture)!r:.80}, {expected}, one of them more than 0")
    return names


def _seed_of(seed: int, source: str) -> int:
    """A seed for the order of a source; grain adds the epoch to it, so that it is no small one."""
    digest = hashlib.sha256(f"{seed} {source}".encode()).digest()
    return int.from_bytes(digest[:4], "big")
