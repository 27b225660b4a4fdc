"""Published checkpoints to native ones, shard by shard."""

import contextlib
import functools
import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from convert.conversion import (
    DEFAULT_EFFORT,
    Converted,
    Effort,
    Outline,
    check_destination,
    copy_along,
    report,
)
from convert.deletion import Deletion, check_deletion, opener_for
from convert.finite import num_not_finite, tell_not_finite
from convert.journal import Record
from convert.native_layout import (
    are_put,
    layout_json,
    native_json,
    native_layout,
    num_bytes,
    places,
)
from convert.pipeline import Pipeline
from convert.portions import Portion, portions
from convert.record import entries_of, write_record
from convert.shards import do_share
from convert.workspace import Workspace, open_workspace
from glm5_jax.atomic import sync
from glm5_jax.checkpoint import CONFIG_NAME, PARAMS_NAME, write_text_files
from glm5_jax.chunks import Layout
from glm5_jax.console import Advance
from glm5_jax.published.names import published_tensors
from glm5_jax.published.source import PublishedSource
from glm5_jax.published.storage import Data, Opener
from glm5_jax.published.subset import WHOLE, Subset
from glm5_jax.published.tensor_file import TensorFile
from glm5_jax.remote import AnyPath
from glm5_jax.tree_writer import TreeWriter

_KEYS = ("chunks", "not_finite")  # of the record of a shard


def outline(
    directory: AnyPath,
    destination: Path,
    float8_as: jax.typing.DTypeLike | None = None,
    effort: Effort = DEFAULT_EFFORT,
    subset: Subset = WHOLE,
) -> Outline:
    """What `from_published` would do; only headers are read.

    Raises:
      InputError: as `from_published`.
    """
    check_deletion(directory, effort, subset)
    opener = opener_for(destination, effort)
    with _opened(directory, float8_as, subset, opener) as (source, leaves):
        return Outline(
            num_units=len(source.files()),
            num_tensors=len(list(published_tensors(source.config))),
            num_chunks=sum(math.prod(place.grid) for place in leaves.values()),
            bytes_read=sum(map(source.num_bytes, source.files())),
            bytes_written=sum(map(num_bytes, leaves.values())),
        )


@contextlib.contextmanager
def _opened(
    directory: AnyPath, float8_as: jax.typing.DTypeLike | None, subset: Subset, opener: Opener
) -> Iterator[tuple[PublishedSource, dict[str, Layout]]]:
    """A source, and how its weights will be laid out."""
    with contextlib.closing(PublishedSource(directory, subset, opener)) as source:
        report(source)
        yield source, native_layout(source, float8_as)


class _Put(NamedTuple):
    """A chunk that is on the disk."""

    tensor: str
    num_not_finite: int
    entry: list[Any]  # leaf, position and digest


def from_published(
    directory: AnyPath,
    destination: Path,
    float8_as: jax.typing.DTypeLike | None = None,
    effort: Effort = DEFAULT_EFFORT,
    subset: Subset = WHOLE,
) -> Converted | None:
    """Converts a published checkpoint to a native one, or goes on with converting it.

    Args:
      float8_as: the dtype that float8 weights are multiplied out to; the config's unless given.
        As float8 they are kept, with their scales.
      subset: the part of the checkpoint to make a model of.

    Returns:
      None if other processes have not finished their share yet.

    Raises:
      InputError: the source is not a whole, sound checkpoint, or the destination exists.
    """
    check_destination(destination, directory)
    check_deletion(directory, effort, subset)
    opener = opener_for(destination, effort)
    with _opened(directory, float8_as, subset, opener) as (source, leaves):
        plan = {
            "source": str(directory.resolve()),
            "shards": {file.path.name: list(file.version) for file in source.files()},
            "leaves": {leaf: layout_json(place) for leaf, place in leaves.items()},
            "config": source.raw_config,
            "subset": subset.options(),
        }
        is_there = functools.partial(are_put, leaves)
        with open_workspace(
            destination,
            plan,
            effort.share,
            keys=_KEYS,
            is_there=is_there,
            restart=effort.restart,
        ) as workspace:
            return _Conversion(source, leaves, float8_as, workspace, effort).run()


class _Conversion:
    """One run of the command."""

    def __init__(
        self,
        source: PublishedSource,
        leaves: dict[str, Layout],
        float8_as: jax.typing.DTypeLike | None,
        workspace: Workspace,
        effort: Effort,
    ):
        self._source = source
        self._leaves = leaves
        self._float8_as = float8_as
        self._workspace = workspace
        self._effort = effort
        self._files = {file.path.name: file for file in source.files()}
        self._places = places(source.config, leaves)
        params = workspace.content / PARAMS_NAME
        # Weights are all there if a process was killed between making them a tree and the rename.
        self._writer = None if params.exists() else TreeWriter(params, leaves)

    def run(self) -> Converted | None:
        sizes = {shard: self._source.num_bytes(file) for shard, file in self._files.items()}
        written = sum(map(num_bytes, self._leaves.values()))
        growth = written / sum(sizes.values())
        deletion = Deletion(self._source, self._workspace, self._effort)
        deletion.catch_up()
        do_share(
            "from-hf",
            self._workspace,
            sizes,
            self._effort,
            self._convert,
            growth=growth,
            freed=deletion.freed,
            prepare=lambda: self._workspace.look_once(self._look_at_all),
            finished=deletion.delete,
        )
        for file in self._files.values():  # scales may have been read after the rest of a shard
            file.require_unchanged()
        with self._workspace.finishing(sizes) as records:
            if records is None:
                return None
            tell_not_finite(self._source.directory, records.values(), strict=self._effort.strict)
            deletion.catch_up()
            self._commit(records)
        num_tensors = sum(place.spread is None for place in self._places.values())
        return Converted(num_tensors, written, deletion.num_deleted)

    def _look_at_all(self) -> None:
        self._source.check_scales()
        self._source.check_copies()

    def _convert(self, shard: str, pipeline: Pipeline, advance: Advance) -> Record:
        """Reads a shard from start to end and puts the chunks that its tensors become.

        There is a digest of a shard that is read whole.
        """
        file, digest = self._files[shard], hashlib.sha256()
        whole = self._source.subset == WHOLE
        putting: list[Future[_Put | None]] = []
        for portion in portions(file, self._places, whole=whole):
            memory, spare = self._memory_of(portion), file.spare(portion.size)
            pipeline.take(memory + spare)
            data = file.read_bytes(portion.offset, portion.size)
            pipeline.give_back(spare)

            def put(
                portion: Portion = portion, data: Data = data, memory: int = memory
            ) -> _Put | None:
                done = self._put(file, portion, data)
                pipeline.give_back(memory)
                advance(portion.size - portion.again)
                return done

            if whole:
                digest.update(memoryview(data)[portion.again :])
            putting.append(pipeline.submit(put))
            del data, put  # which would hold the bytes until there is memory for the next
        file.require_unchanged()
        chunks = [done for each in putting if (done := each.result())]
        if self._writer is not None:
            self._writer.flush()
        not_finite: Counter[str] = Counter()
        for chunk in chunks:
            not_finite[chunk.tensor] += chunk.num_not_finite
        return {
            "shard": shard,
            "size": file.version.size,
            "sha256": digest.hexdigest() if whole else None,
            "not_finite": dict(+not_finite),
            "chunks": [chunk.entry for chunk in chunks],
        }

    def _memory_of(self, portion: Portion) -> int:
        """What a portion takes from when it is read until its chunk is on the disk."""
        if portion.chunk is None:
            return portion.size
        name, part = portion.chunk
        made = math.prod(part.chunk_shape) * self._places[name].dtype.itemsize
        return portion.size + (0 if made == portion.size else made)

    def _put(self, file: TensorFile, portion: Portion, data: Data) -> "_Put | None":
        if portion.chunk is None:
            return None
        name, part = portion.chunk
        leaf, dtype, _, spread = self._places[name]
        rows = stored = file.as_rows(name, data)
        if spread is not None:
            rows = spread(stored)
        elif stored.dtype != dtype:
            rows = self._source.decode(name, stored, part.start, dtype)
        chunk = rows.reshape(part.chunk_shape).astype(dtype, copy=False)
        assert self._writer is not None
        digest = self._writer.put(leaf, part.position, chunk)
        entry = [leaf, part.position, digest]
        return _Put(name, num_not_finite(stored) or num_not_finite(chunk), entry)

    def _commit(self, records: dict[str, Record]) -> None:
        if self._writer is None:
            return
        for record in records.values():
            for leaf, position, digest in record["chunks"]:
                self._writer.has_put(leaf, tuple(position), digest)
        content, origin = self._workspace.content, self._source.directory
        read = entries_of(records)
        options = self._source.subset.options()
        if self._float8_as:
            options["float8 as"] = jnp.dtype(self._float8_as).name
        write_record(content, "from-hf", origin, options, read=read, written={})
        copy_along(origin, content)
        write_text_files(content, native_json(self._source, self._leaves), origin)
        for path in content.iterdir():
            if path.is_file():
                sync(path)
        self._writer.commit(beside=[CONFIG_NAME])
