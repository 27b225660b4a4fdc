"""Proving a checkpoint: every byte against its digest, every value against what it was made of."""

import contextlib
import hashlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from rich.progress import DownloadColumn, TransferSpeedColumn

from convert.conversion import DEFAULT_EFFORT, Effort
from convert.diff import Source, config_differences, open_source
from convert.pipeline import Pipeline
from convert.record import RECORD_NAME, written_files
from convert.rounding import rounded_rows
from glm5_jax.chunks import CHUNK_BYTES
from glm5_jax.console import progress
from glm5_jax.errors import InputError
from glm5_jax.plain_files import open_plain
from glm5_jax.published.families import by_family
from glm5_jax.published.native import NativeSource
from glm5_jax.published.source import Stored
from glm5_jax.published.subset import WHOLE, Subset
from glm5_jax.remote import AnyPath

_READ_BYTES = 2**24
Item = TypeVar("Item")


class Verified(NamedTuple):
    """What was looked at and found sound."""

    num_tensors: int
    num_bytes: int
    num_files: int  # of which the whole SHA-256 was compared


class _Fault(NamedTuple):
    where: str
    what: str


def verify(
    directory: Path,
    against: AnyPath | None = None,
    sample: float = 1.0,
    seed: int = 0,
    effort: Effort = DEFAULT_EFFORT,
    subset: Subset = WHOLE,
) -> Verified:
    """Reads a checkpoint again.

    Chunks of a native one are compared with the manifest, files of a published one with the record
    of the conversion that made them.

    Args:
      against: what it was made of: tensors must have the values of that one's, in their own dtype.
      sample: the share of portions, or files, to look at.
      seed: of which these are.
      subset: the part of `against` that it was made of.

    Raises:
      InputError: it is damaged, or not what it was made of; every fault is named. Or there is
        nothing to compare it with.
    """
    if against is None and subset != WHOLE:
        raise InputError(
            "--layers and --experts say what part of SRC it is, expected --against SRC"
        )
    rng = random.Random(seed)
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(contextlib.closing(open_source(directory)))
        origin: Source | None = None
        if against is not None:
            origin = stack.enter_context(contextlib.closing(open_source(against, subset)))
        files = None if isinstance(made, NativeSource) else written_files(directory)
        if files is None and origin is None and not isinstance(made, NativeSource):
            raise InputError(
                f"{directory}: has no {RECORD_NAME} with digests; expected --against SRC"
            )
        theirs = origin.tensors() if origin else {}
        faults = list(_missing(made.tensors(), origin, theirs)) if origin else []
        if origin is not None:
            faults += _config_faults(made, origin)
        if files is not None and not isinstance(made, NativeSource):
            unlisted = [file.path.name for file in made.files() if file.path.name not in files]
            faults += [_Fault(name, f"is not in {RECORD_NAME}") for name in unlisted]
        work: list[tuple[int, Callable[[], _Fault | None]]] = []
        whole = _sampled(list((files or {}).items()), sample, rng)
        for name, entry in whole:
            check = _file_check(directory / name, entry["size"], entry["sha256"])
            work.append((entry["size"], check))
        portions = []
        if origin is not None or files is None:
            portions = _sampled(list(_portions(made)), sample, rng)
        for portion in portions:
            same_shape = portion.tensor in theirs and portion.shape == theirs[portion.tensor].shape
            work.append((portion.num_bytes, _check(made, origin if same_shape else None, portion)))
        total = sum(size for size, _ in work)
        pipeline = stack.enter_context(
            contextlib.closing(Pipeline(effort.memory, effort.num_threads))
        )
        columns = (DownloadColumn(), TransferSpeedColumn())
        advance = stack.enter_context(progress("verify", total, *columns))
        # Of both checkpoints, and of float8 in float32.
        needs = ((5 * min(size, CHUNK_BYTES), task) for size, task in work)
        for (size, _), fault in zip(work, pipeline.ahead(needs), strict=True):
            if fault is not None:
                faults.append(fault)
            advance(size)
    if faults:
        said = "; ".join(f"{subject}: {what}" for subject, what, _ in by_family(faults))
        raise InputError(f"{directory}: {said}")
    return Verified(len({each.tensor for each in portions}), total, len(whole))


def _sampled(items: list[Item], sample: float, rng: random.Random) -> list[Item]:
    """A share of items, and one of them at least."""
    return [item for item in items if rng.random() < sample] or items[:1]


class _Portion(NamedTuple):
    tensor: str
    shape: tuple[int, ...]  # of the whole tensor
    start: int
    stop: int
    num_bytes: int


def _portions(made: Source) -> Iterator[_Portion]:
    for name, stored in made.tensors().items():
        row_bytes = int(np.prod(stored.shape[1:], dtype=np.int64)) * stored.dtype.itemsize
        for start, stop in made.blocks(name):
            yield _Portion(name, stored.shape, start, stop, row_bytes * (stop - start))


def _config_faults(made: Source, origin: Source) -> Iterator[_Fault]:
    """Keys of the configs that differ, but for the dtype, which weights may be converted to."""
    for difference in config_differences(made, origin):
        if difference.where != "config.json, dtype":
            yield _Fault(difference.where, f"differs, {difference.what}, from {origin.directory}")


def _missing(
    ours: dict[str, Stored], origin: Source, theirs: dict[str, Stored]
) -> Iterator[_Fault]:
    copies = () if isinstance(origin, NativeSource) else origin.copies
    for name in theirs:
        if name not in ours and name not in copies:
            yield _Fault(name, f"is missing, {origin.directory} has it")
    for name, stored in ours.items():
        if name not in theirs:
            yield _Fault(name, f"is not in {origin.directory}")
        elif stored.shape != theirs[name].shape:
            shapes = f"{list(stored.shape)}, not {list(theirs[name].shape)}"
            yield _Fault(name, f"has the shape {shapes} as in {origin.directory}")


def _check(made: Source, origin: Source | None, portion: _Portion) -> Callable[[], _Fault | None]:
    def check() -> _Fault | None:
        name, shape, start, stop, _ = portion
        try:
            rows = made.read(name, start, stop)
        except InputError as error:
            return _Fault(name, str(error).removeprefix(f"{made.directory}/"))
        if origin is None:
            return None
        scheme = made.scheme(name) if isinstance(made, NativeSource) else None
        try:
            if scheme is not None and not origin.has_scales(name):  # it was rounded
                expected = rounded_rows(origin, name, shape, start, stop, scheme).back
            else:
                expected = origin.read(name, start, stop).astype(rows.dtype, copy=False)
        except InputError as error:
            return _Fault(name, str(error))
        if rows.tobytes() != expected.tobytes():
            return _Fault(name, f"has other values than in {origin.directory}")
        return None

    return check


def _file_check(path: Path, size: int, expected: str) -> Callable[[], _Fault | None]:
    def check() -> _Fault | None:
        digest = hashlib.sha256()
        try:
            with open(open_plain(path), "rb") as file:
                while part := file.read(_READ_BYTES):
                    digest.update(part)
                if file.tell() != size:
                    return _Fault(path.name, f"has {file.tell():,} bytes, expected {size:,}")
        except OSError as error:
            return _Fault(path.name, f"cannot be read: {error.strerror}")
        if digest.hexdigest() != expected:
            return _Fault(path.name, f"damaged, its SHA-256 is not the one in {RECORD_NAME}")
        return None

    return check
