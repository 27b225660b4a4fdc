"""Comparing two checkpoints tensor by tensor."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.progress import TextColumn

from glm5_jax.checkpoint import is_native
from glm5_jax.console import progress
from glm5_jax.published.native import NativeSource
from glm5_jax.published.source import PublishedSource

Source = NativeSource | PublishedSource


class Difference(NamedTuple):
    """One way in which two checkpoints differ."""

    tensor: str
    what: str


class Comparison(NamedTuple):
    """The outcome of a comparison."""

    num_tensors: int  # in both
    largest: float  # absolute difference between values
    differences: list[Difference]


def open_source(directory: Path) -> Source:
    """Opens a checkpoint of either layout.

    Raises:
      InputError: it is not a whole, sound checkpoint.
    """
    return NativeSource(directory) if is_native(directory) else PublishedSource(directory)


def compare(first: Path, second: Path) -> Comparison:
    """Compares names, shapes, dtypes and values; float8 by what its scales multiply it to.

    Raises:
      InputError: one of them is not a whole, sound checkpoint.
    """
    with contextlib.ExitStack() as stack:
        a, b = (
            stack.enter_context(contextlib.closing(open_source(path))) for path in (first, second)
        )
        in_a, in_b = a.tensors(), b.tensors()
        differences = [Difference(n, f"only in {first}") for n in in_a if n not in in_b]
        differences += [Difference(n, f"only in {second}") for n in in_b if n not in in_a]
        common = [name for name in in_a if name in in_b]
        largest = 0.0
        count = TextColumn("{task.completed}/{task.total} tensors")
        advance = stack.enter_context(progress("diff", len(common), count))
        for name in common:
            advance(1)
            if in_a[name].shape != in_b[name].shape:
                what = f"shapes {list(in_a[name].shape)} and {list(in_b[name].shape)}"
                differences.append(Difference(name, what))
                continue
            if in_a[name].dtype != in_b[name].dtype:
                what = f"dtypes {in_a[name].dtype.name} and {in_b[name].dtype.name}"
                differences.append(Difference(name, what))
            distance = max(_distances(a, b, name))
            if distance > 0:
                differences.append(Difference(name, f"values by up to {distance:.3g}"))
            largest = max(largest, distance)
    return Comparison(len(common), largest, differences)


def _distances(a: Source, b: Source, name: str) -> Iterator[float]:
    """The largest absolute difference of each portion of a tensor; infinite where one is NaN."""
    for start, stop in a.blocks(name):
        x, y = (source.read(name, start, stop).astype(np.float64) for source in (a, b))
        gap = np.abs(x - y)
        gap = np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0.0, gap)
        yield float(np.nan_to_num(gap, nan=np.inf).max(initial=0.0))
