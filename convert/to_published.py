"""Native checkpoints to published ones, shard by shard."""

import contextlib
import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from convert.conversion import (
    DEFAULT_EFFORT,
    Converted,
    Effort,
    Outline,
    check_destination,
    copy_along,
    report,
)
from convert.finite import num_not_finite, tell_not_finite
from convert.journal import Record
from convert.native_layout import FLOAT8, num_bytes
from convert.pipeline import Pipeline
from convert.record import entries_of, entry_of, manifest_entry, write_record
from convert.shards import do_share
from convert.workspace import Workspace, open_workspace
from convert.writer import Entry, file_header, shard_names, split_shards, write_index
from glm5_jax.atomic import write_all
from glm5_jax.checkpoint import CONFIG_NAME, write_text_files
from glm5_jax.console import Advance
from glm5_jax.errors import InputError
from glm5_jax.params import leaf_dtype
from glm5_jax.published.files import INDEX_NAME
from glm5_jax.published.fp8 import SCALE_SUFFIX, scale_shape
from glm5_jax.published.native import NativeSource
from glm5_jax.published.source import Stored


def to_published(
    directory: Path,
    destination: Path,
    shard_bytes: int,
    dtype: jax.typing.DTypeLike | None = None,
    effort: Effort = DEFAULT_EFFORT,
) -> Converted | None:
    """Converts a native checkpoint to the published layout, or goes on with converting it.

    Args:
      shard_bytes: the largest size of a file; a checkpoint that is no larger is a single file.
      dtype: to round weights to, but for those that are pinned to another; theirs unless given.

    Returns:
      None if other processes have not finished their share yet.

    Raises:
      InputError: the source is not a whole, sound checkpoint, or the destination exists.
    """
    check_destination(destination, directory)
    with _opened(directory, shard_bytes, dtype) as (source, shards):
        plan = {
            "source": str(directory.resolve()),
            "weights": source.digest,
            "config": source.raw_config,
            "shard size": shard_bytes,
            "dtype": None if dtype is None else jnp.dtype(dtype).name,
        }
        with open_workspace(
            destination,
            plan,
            effort.share,
            keys=("not_finite",),
            is_there=_is_there,
            restart=effort.restart,
        ) as workspace:
            return _Conversion(source, shards, dtype, workspace, effort).run()


def _is_there(content: Path, record: Record) -> bool:
    path = content / str(record["shard"])
    return path.is_file() and path.stat().st_size == record["size"]


def outline(
    directory: Path, shard_bytes: int, dtype: jax.typing.DTypeLike | None = None
) -> Outline:
    """What `to_published` would do.

    Raises:
      InputError: as `to_published`.
    """
    with _opened(directory, shard_bytes, dtype) as (source, shards):
        entries = [entry for shard in shards for entry in shard]
        leaves = source.leaves.values()
        return Outline(
            num_units=len(shards),
            num_tensors=_num_tensors(entries),
            num_chunks=sum(math.prod(place.grid) for place in leaves),
            bytes_read=sum(map(num_bytes, leaves)),
            bytes_written=sum(entry.num_bytes for entry in entries),
        )


@contextlib.contextmanager
def _opened(
    directory: Path, shard_bytes: int, dtype: jax.typing.DTypeLike | None
) -> Iterator[tuple[NativeSource, list[list[Entry]]]]:
    """A source, and the files that its tensors will be in."""
    with contextlib.closing(NativeSource(directory)) as source:
        report(source)
        entries = [
            entry
            for name, stored in source.tensors().items()
            for entry in _entries_of(source, name, stored, dtype)
        ]
        _refuse_unpublished(entries, directory)
        yield source, split_shards(entries, shard_bytes)


class _Read(NamedTuple):
    """A portion of a tensor, as it is written."""

    tensor: str
    rows: np.ndarray
    num_not_finite: int


class _Conversion:
    """One run of the command."""

    def __init__(
        self,
        source: NativeSource,
        shards: list[list[Entry]],
        dtype: jax.typing.DTypeLike | None,
        workspace: Workspace,
        effort: Effort,
    ):
        self._source = source
        self._shards = dict(zip(shard_names(len(shards)), shards, strict=True))
        self._dtype = dtype
        self._workspace = workspace
        self._effort = effort

    def run(self) -> Converted | None:
        sizes = {
            shard: sum(entry.num_bytes for entry in entries)
            for shard, entries in self._shards.items()
        }
        do_share("to-hf", self._workspace, sizes, self._effort, self._write)
        with self._workspace.finishing(sizes) as records:
            if records is None:
                return None
            tell_not_finite(self._source.directory, records.values(), strict=self._effort.strict)
            self._commit(records)
        entries = (entry for shard in self._shards.values() for entry in shard)
        return Converted(_num_tensors(entries), sum(sizes.values()))

    def _write(self, shard: str, pipeline: Pipeline, advance: Advance) -> Record:
        """Writes a shard from start to end, while the chunks of what follows are being read."""
        digest, not_finite = hashlib.sha256(), Counter[str]()
        unfinished = self._workspace.partial(shard)
        with unfinished.open("wb", buffering=0) as file:

            def write(data: Any) -> None:
                digest.update(data)
                write_all(file, memoryview(data))

            write(file_header(self._shards[shard]))
            for name, rows, count in pipeline.ahead(self._portions(shard)):
                write(rows.view(np.uint8).reshape(-1).data)
                advance(rows.nbytes)
                not_finite[name] += count
            os.fsync(file.fileno())
            size = file.tell()
        unfinished.replace(self._workspace.content / shard)
        return {
            "shard": shard,
            "size": size,
            "sha256": digest.hexdigest(),
            "not_finite": dict(+not_finite),
        }

    def _portions(self, shard: str) -> Iterator[tuple[int, Callable[[], _Read]]]:
        for entry in self._shards[shard]:
            if entry.name.endswith(SCALE_SUFFIX):
                name = entry.name.removesuffix(SCALE_SUFFIX)

                def read_scales(entry: Entry = entry, name: str = name) -> _Read:
                    scales = self._source.scales(name)
                    return _Read(entry.name, scales, num_not_finite(scales))

                yield entry.num_bytes, read_scales
                continue
            row_bytes = entry.num_bytes // entry.shape[0]
            for start, stop in self._source.blocks(entry.name):

                def read(entry: Entry = entry, start: int = start, stop: int = stop) -> _Read:
                    read_rows = self._source.read
                    if entry.dtype == FLOAT8.kind:
                        read_rows = self._source.read_kept
                    rows = read_rows(entry.name, start, stop)
                    rows = np.ascontiguousarray(rows.astype(entry.dtype, copy=False))
                    return _Read(entry.name, rows, num_not_finite(rows))

                # As written, and as stored, where it may be twice as wide.
                yield 3 * row_bytes * (stop - start), read

    def _commit(self, records: dict[str, Record]) -> None:
        content, origin = self._workspace.content, self._source.directory
        if len(self._shards) > 1:
            write_index(content, self._shards)
        config = self._source.raw_config
        if self._dtype:  # which older files name otherwise
            gone = ("torch_dtype", "quantization_config")
            config = {key: value for key, value in config.items() if key not in gone}
            config["dtype"] = jnp.dtype(self._dtype).name
        write_text_files(content, config, origin)
        copy_along(origin, content)
        written = entries_of(records)
        for name in (CONFIG_NAME, INDEX_NAME):
            if (content / name).exists():
                written[name] = entry_of(content / name)
        options = {"dtype": jnp.dtype(self._dtype).name} if self._dtype else {}
        write_record(
            content,
            "to-hf",
            origin,
            options,
            read=manifest_entry(self._source),
            written=written,
        )


def _entries_of(
    source: NativeSource, name: str, stored: Stored, dtype: jax.typing.DTypeLike | None
) -> Iterator[Entry]:
    """What a tensor is published as: rounded to a dtype if that is asked for."""
    scheme = source.scheme(name)
    if dtype is not None:
        yield Entry(name, stored.shape, leaf_dtype(source.spec(name), dtype))
    elif scheme is None:
        yield Entry(name, stored.shape, stored.dtype)
    else:
        yield Entry(name, stored.shape, jnp.dtype(scheme.kind))
        yield Entry(name + SCALE_SUFFIX, scale_shape(stored.shape), jnp.dtype(jnp.float32))


def _num_tensors(entries: Iterable[Entry]) -> int:
    return sum(not entry.name.endswith(SCALE_SUFFIX) for entry in entries)


def _refuse_unpublished(entries: list[Entry], directory: Path) -> None:
    found = {entry.dtype.name for entry in entries} & {"int8", "int4"}
    if found:
        raise InputError(
            f"{directory}: has weights in {', '.join(found)}, in which none are published; "
            "expected --dtype bfloat16 or float32, to which they are multiplied out"
        )
