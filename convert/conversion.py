"""Published to native and back, a chunk at a time."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import DownloadColumn, TextColumn

from convert.writer import Entry, shard_names, split_shards, write_file, write_index
from glm5_jax.atomic import new_directory, refuse_existing
from glm5_jax.checkpoint import new_checkpoint, params_layout, write_text_files
from glm5_jax.chunks import Layout
from glm5_jax.commands.arguments import report_unknown_keys
from glm5_jax.console import Advance, notice, progress
from glm5_jax.errors import InputError
from glm5_jax.params import leaf_dtype
from glm5_jax.published.names import published_tensors
from glm5_jax.published.native import NativeSource
from glm5_jax.published.slices import slices
from glm5_jax.published.source import PublishedSource


class Converted(NamedTuple):
    """What a conversion moved."""

    num_tensors: int
    num_bytes: int  # as written


@contextlib.contextmanager
def _tensor_progress(description: str, num_tensors: int, num_bytes: int) -> Iterator[Advance]:
    """A bar in bytes that also counts tensors."""
    with progress(
        description,
        num_bytes,
        TextColumn("{task.fields[done]}/" + f"{num_tensors} tensors"),
        DownloadColumn(),
        done=0,
    ) as advance:
        yield advance


def from_published(
    directory: Path, destination: Path, float8_as: jax.typing.DTypeLike | None = None
) -> Converted:
    """Converts a published checkpoint to a native one.

    Args:
      float8_as: the dtype that float8 weights are multiplied out to; the config's unless given.

    Raises:
      InputError: the source is not a whole, sound checkpoint, or the destination exists.
    """
    _check_destination(destination, directory)
    with contextlib.closing(PublishedSource(directory)) as source:
        report(source)
        leaves = _native_layout(source, float8_as)
        tensors = sorted(
            published_tensors(source.config), key=lambda tensor: source.location(tensor.name)
        )
        total = sum(_num_bytes(leaf) for leaf in leaves.values())
        with (
            _tensor_progress("from-hf", len(tensors), total) as advance,
            new_checkpoint(destination, _native_json(source), leaves, directory) as writer,
        ):
            source.check_copies()
            for number, tensor in enumerate(tensors, start=1):
                place = leaves[tensor.leaf]
                for part in slices(tensor, place):
                    rows = source.read(tensor.name, part.start, part.stop)
                    chunk = rows.reshape(part.chunk_shape).astype(place.dtype, copy=False)
                    writer.put(tensor.leaf, part.position, chunk)
                    advance(chunk.nbytes, done=number)
    return Converted(len(tensors), total)


def to_published(
    directory: Path,
    destination: Path,
    shard_bytes: int,
    dtype: jax.typing.DTypeLike | None = None,
) -> Converted:
    """Converts a native checkpoint to the published layout.

    Args:
      shard_bytes: the largest size of a file; a checkpoint that is no larger is a single file.
      dtype: to round weights to, but for those that are pinned to another; theirs unless given.

    Raises:
      InputError: the source is not a whole, sound checkpoint, or the destination exists.
    """
    _check_destination(destination, directory)
    with contextlib.closing(NativeSource(directory)) as source:
        entries = [
            Entry(name, stored.shape, _dtype_in(source, name, dtype) if dtype else stored.dtype)
            for name, stored in source.tensors().items()
        ]
        shards = split_shards(entries, shard_bytes)
        total = sum(entry.num_bytes for entry in entries)
        with (
            _tensor_progress("to-hf", len(entries), total) as advance,
            new_directory(destination) as partial,
        ):
            done = 0

            def rows(shard: list[Entry]) -> Iterator[np.ndarray]:
                nonlocal done
                for entry in shard:
                    done += 1
                    for start, stop in source.blocks(entry.name):
                        part = source.read(entry.name, start, stop)
                        part = part.astype(entry.dtype, copy=False)
                        yield part
                        advance(part.nbytes, done=done)

            for name, shard in zip(shard_names(len(shards)), shards, strict=True):
                write_file(partial / name, shard, rows(shard))
            if len(shards) > 1:
                write_index(partial, shards)
            config = source.raw_config
            if dtype:  # which older files name otherwise
                config = {key: value for key, value in config.items() if key != "torch_dtype"}
                config["dtype"] = jnp.dtype(dtype).name
            write_text_files(partial, config, directory)
    return Converted(len(entries), total)


def _dtype_in(source: NativeSource, name: str, dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype of a tensor in a model of another dtype than that of the source."""
    return leaf_dtype(source.spec(name), dtype)


def _check_destination(destination: Path, source: Path) -> None:
    refuse_existing(destination)
    if source.resolve() in destination.resolve().parents:
        raise InputError(f"{destination}: lies within {source}, expected a place outside it")


def report(source: NativeSource | PublishedSource) -> None:
    """Tells what of a checkpoint is passed over."""
    report_unknown_keys(source.directory, source.unknown_keys)
    if not isinstance(source, PublishedSource):
        return
    if source.lacks_mtp:
        notice(f"{source.directory}: config.json promises an MTP layer, but the files hold none")
    if unused := source.unused_files():
        notice(f"{source.directory}: files that the index does not name: {', '.join(unused)}")


def _num_bytes(place: Layout) -> int:
    return int(np.prod(place.shape, dtype=np.int64)) * place.dtype.itemsize


def _native_layout(
    source: PublishedSource, float8_as: jax.typing.DTypeLike | None
) -> dict[str, Layout]:
    """Leaves keep the dtype of their tensors; float8 becomes what is asked for.

    Where some tensors of a leaf are float8 and others not, all become what holds both.
    """
    stored = source.tensors()
    dtypes: dict[str, jax.typing.DTypeLike] = {}
    with jax.numpy_dtype_promotion("standard"):  # asks for what holds both, and mixes no arrays
        for tensor in published_tensors(source.config):
            dtype: jax.typing.DTypeLike = stored[tensor.name].dtype
            if source.is_float8(tensor.name):
                dtype = float8_as or source.config.dtype
            dtypes[tensor.leaf] = jnp.promote_types(dtypes.get(tensor.leaf, dtype), dtype)
    return params_layout(source.config, dtypes)


def _native_json(source: PublishedSource) -> dict[str, Any]:
    """The source's own `config.json`, but for what is no longer so."""
    raw = {key: value for key, value in source.raw_config.items() if key != "quantization_config"}
    if source.lacks_mtp:
        raw["num_nextn_predict_layers"] = 0
    return raw
