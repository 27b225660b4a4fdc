"""Comparing two checkpoints tensor by tensor."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from rich.progress import TextColumn

from glm5_jax.checkpoint import is_native
from glm5_jax.config_json import config_to_json
from glm5_jax.console import progress
from glm5_jax.errors import InputError
from glm5_jax.published.families import by_family
from glm5_jax.published.native import NativeSource
from glm5_jax.published.source import PublishedSource
from glm5_jax.published.subset import WHOLE, Subset
from glm5_jax.remote import AnyPath, RemotePath

Source = NativeSource | PublishedSource


class Difference(NamedTuple):
    """One way in which two checkpoints differ."""

    where: str  # a tensor, or a key of config.json
    what: str
    distance: float = 0.0  # largest absolute difference between values


class Comparison(NamedTuple):
    """The outcome of a comparison."""

    num_tensors: int  # in both
    differences: list[Difference]

    @property
    def largest(self) -> float:
        """The largest absolute difference between values."""
        return max((difference.distance for difference in self.differences), default=0.0)

    def lines(self) -> Iterator[str]:
        """The differences for a reader; many of a kind share a line."""
        distances = {(where, what): distance for where, what, distance in self.differences}
        for subject, what, names in by_family((d.where, d.what) for d in self.differences):
            distance = max(distances[name, what] for name in names)
            yield f"{subject}: {what}" + (f" by up to {distance:.3g}" if distance else "")


def open_source(directory: AnyPath, subset: Subset = WHOLE) -> Source:
    """Opens a checkpoint of either layout.

    Args:
      subset: the part that is looked at, of a published one.

    Raises:
      InputError: it is not a whole, sound checkpoint, or a native one that is not on this machine.
    """
    if not is_native(directory):
        return PublishedSource(directory, subset)
    if subset != WHOLE:
        raise InputError(f"{directory}: is native, expected a published one to take a part of")
    if isinstance(directory, RemotePath):
        raise InputError(f"{directory}: is a native checkpoint, which is read from a disk only")
    return NativeSource(directory)


def compare(first: AnyPath, second: AnyPath) -> Comparison:
    """Compares configs, and the tensors' names, shapes, dtypes and values.

    Float8 counts as what its scales multiply it to, in the dtype that the other checkpoint has.

    Raises:
      InputError: one of them is not a whole, sound checkpoint.
    """
    with contextlib.ExitStack() as stack:
        a, b = (
            stack.enter_context(contextlib.closing(open_source(path))) for path in (first, second)
        )
        in_a, in_b = a.tensors(), b.tensors()
        differences = list(config_differences(a, b))
        differences += [Difference(name, f"only in {first}") for name in in_a if name not in in_b]
        differences += [Difference(name, f"only in {second}") for name in in_b if name not in in_a]
        common = [name for name in in_a if name in in_b]
        count = TextColumn("{task.completed}/{task.total} tensors")
        advance = stack.enter_context(progress("diff", len(common), count))
        for name in common:
            if in_a[name].shape != in_b[name].shape:
                what = f"shapes {list(in_a[name].shape)} and {list(in_b[name].shape)}"
                differences.append(Difference(name, what))
            else:
                dtypes = in_a[name].dtype, in_b[name].dtype
                differences += _tensor_differences(a, b, name, dtypes)
            advance(1)
    return Comparison(len(common), differences)


def config_differences(a: Source, b: Source) -> Iterator[Difference]:
    """The keys of `config.json` that differ."""
    ours, theirs = config_to_json(a.config), config_to_json(b.config)
    for key, value in ours.items():
        if value != theirs[key]:
            yield Difference(f"config.json, {key}", f"{value!r:.80} and {theirs[key]!r:.80}")


def _tensor_differences(
    a: Source, b: Source, name: str, dtypes: tuple[np.dtype, np.dtype]
) -> Iterator[Difference]:
    if a.has_scales(name) != b.has_scales(name):  # whichever was not read as float32
        common = dtypes[1] if a.has_scales(name) else dtypes[0]
    else:
        common = None
        if dtypes[0] != dtypes[1]:
            yield Difference(name, f"dtypes {dtypes[0].name} and {dtypes[1].name}")
    distance, same_bits = 0.0, True
    for start, stop in a.blocks(name):
        x, y = (source.read(name, start, stop) for source in (a, b))
        if common is not None:
            x, y = x.astype(common), y.astype(common)
        if x.dtype == y.dtype and x.tobytes() == y.tobytes():
            continue
        same_bits = same_bits and x.dtype != y.dtype
        distance = max(distance, _distance(x.astype(np.float64), y.astype(np.float64)))
    if distance > 0:
        yield Difference(name, "values", distance)
    elif not same_bits:
        yield Difference(name, "equal values in other bits")


def _distance(x: np.ndarray, y: np.ndarray) -> float:
    """The largest absolute difference; infinite where only one is NaN or infinite."""
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    with np.errstate(invalid="ignore"):  # infinity less infinity, which is the same
        gap = np.where(same, 0.0, np.abs(x - y))
    return float(np.nan_to_num(gap, nan=np.inf, posinf=np.inf).max(initial=0.0))
