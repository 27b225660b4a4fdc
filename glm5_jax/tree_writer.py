"""Writing trees of arrays, chunk by chunk."""

import contextlib
import json
import logging
import shutil
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from glm5_jax.atomic import sync, write_all
from glm5_jax.chunks import Layout
from glm5_jax.mesh import fetch_part
from glm5_jax.tree_store import (
    FORMAT,
    MANIFEST_NAME,
    METADATA_NAME,
    chunk_digest,
    chunk_name,
    file_digest,
    zarr_spec,
)


class TreeWriter:
    """Writes a tree chunk by chunk; `commit` makes it a checkpoint.

    Chunks are on the disk when `flush` returns, so that whatever ends the process before `commit`,
    another writer can go on: what was put is named to it by `has_put`. Several threads may put.
    A chunk is a plain file of its elements, so it is written without TensorStore, which makes
    copies and does not tell why a write failed.
    """

    def __init__(self, directory: Path, leaves: Mapping[str, Layout]):
        """Starts a tree of the given leaves, by path, or goes on with it.

        Args:
          directory: what does not exist yet; chunks gather beside it.
        """
        self._directory = directory
        self._staging = _staging(directory)
        self._unflushed: list[Path] = []
        self._noting, self._flushing = threading.Lock(), threading.Lock()
        self._failure: OSError | None = None
        self._name = uuid.uuid4().hex  # of what is unfinished, for others may write here, too
        self._unfinished = directory.with_name(directory.name + ".unfinished")
        self._leaves = leaves
        self._digests: dict[str, dict[tuple[int, ...], str]] = {leaf: {} for leaf in leaves}
        with _as_os_error(directory):
            for leaf, place in leaves.items():
                ts.open(zarr_spec(self._staging / leaf, place), create=True, open=True).result()
        self._unfinished.mkdir(exist_ok=True)

    def put(self, leaf: str, position: tuple[int, ...], chunk: np.ndarray) -> str:
        """Writes one chunk; returns its digest.

        Args:
          position: of the chunk, in the grid of the leaf's layout.
          chunk: in the shape of the chunk's region and the dtype of the leaf.
        """
        place = self._leaves[leaf]
        region = place.region(position)
        expected = tuple(part.stop - part.start for part in region)
        if chunk.shape != expected or chunk.dtype != place.dtype:
            raise ValueError(
                f"chunk of {leaf} is {chunk.dtype}{list(chunk.shape)}, "
                f"expected {place.dtype}{list(expected)}"
            )
        padded = chunk
        if expected != place.chunk:  # the last one of an axis is as large on the disk as others
            padded = np.zeros(place.chunk, place.dtype)
            padded[tuple(slice(size) for size in expected)] = chunk
        path = self._staging / leaf / chunk_name(position)
        unfinished = self._unfinished / f"{leaf}.{path.name}-{self._name}"
        with unfinished.open("wb", buffering=0) as file:
            write_all(file, np.ascontiguousarray(padded).view(np.uint8).reshape(-1).data)
        unfinished.replace(path)
        with self._noting:
            self._unflushed.append(path)
        digest = chunk_digest(chunk)
        self.has_put(leaf, position, digest)
        return digest

    def flush(self) -> None:
        """Has all that was put so far written to the disk.

        Many chunks at a time, for much of it is there already then, and a file system commits them
        together.
        """
        with self._flushing:  # who comes second waits for what the first one took
            if self._failure is not None:  # the system tells of it only once
                raise self._failure
            with self._noting:
                paths, self._unflushed = self._unflushed, []
            try:
                for path in (*paths, *{path.parent for path in paths}):
                    sync(path)
            except OSError as error:
                self._failure = error
                raise

    def has_put(self, leaf: str, position: tuple[int, ...], digest: str) -> None:
        """Notes that a chunk of that digest was put by another writer."""
        self._digests[leaf][position] = digest

    def commit(self, beside: Sequence[str] = ()) -> None:
        """Makes the tree an Orbax checkpoint, with the manifest in its directory.

        Args:
          beside: names of files beside the tree without which it means something else; they are
            verified with it.
        """
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "leaves": {
                leaf: {
                    "shape": list(place.shape),
                    "dtype": place.dtype.name,
                    "chunk": list(place.chunk),
                    "sha256": [self._digests[leaf][position] for position in place.positions()],
                }
                for leaf, place in self._leaves.items()
            },
        }
        self.flush()
        self._add_metadata()
        manifest["metadata_sha256"] = file_digest(self._staging / METADATA_NAME)
        manifest["beside"] = {name: file_digest(self._directory.parent / name) for name in beside}
        (self._staging / MANIFEST_NAME).write_text(json.dumps(manifest))
        shutil.rmtree(self._unfinished)  # with what a writer that was killed has left there
        for path in self._staging.glob("*/*.__lock"):  # and what TensorStore has
            path.unlink()
        for path in self._staging.iterdir():
            sync(path)
        sync(self._staging)
        self._staging.rename(self._directory)

    def _add_metadata(self) -> None:
        """Lets Orbax write what it keeps beside the chunks of a tree.

        It does so in a folder of its own, for chunks that it moved would be lost to a writer that
        goes on after the process was killed here.
        """
        me = jax.process_index()  # whichever of connected processes came last
        alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
        registry = ocp.type_handlers.create_type_handler_registry((_Written, _WrittenHandler()))
        folder = self._directory.with_name(self._directory.name + ".metadata")
        with _quiet(), _as_os_error(self._directory):
            handler = ocp.PyTreeCheckpointHandler(
                use_ocdbt=False,
                use_zarr3=False,
                type_handler_registry=registry,
                multiprocessing_options=alone,
            )
            tree = _nested(dict.fromkeys(self._leaves, _Written()))
            with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
                checkpointer.save(folder.absolute(), tree, force=True)
        for path in folder.iterdir():
            path.replace(self._staging / path.name)
        shutil.rmtree(folder)


def _staging(directory: Path) -> Path:
    return directory.with_name(directory.name + ".staging")


def is_put(directory: Path, leaf: str, place: Layout, position: tuple[int, ...]) -> bool:
    """Whether a chunk of a tree that is being written is there, as far as its size tells."""
    path = _staging(directory) / leaf / chunk_name(position)
    return path.is_file() and path.stat().st_size == place.chunk_bytes


def write_tree(
    directory: Path | None,
    arrays: Mapping[str, jax.Array | np.ndarray],
    leaves: Mapping[str, Layout],
    beside: Sequence[str] = (),
) -> None:
    """Writes arrays, by path, in the given layouts; `beside` as in `TreeWriter.commit`.

    The first process has a directory to write to; the others, given None, hand over what they hold.
    """
    writer = None if directory is None else TreeWriter(directory, leaves)
    for leaf, place in leaves.items():
        for position in place.positions():
            chunk = fetch_part(arrays[leaf], place.region(position))
            if writer is not None:
                writer.put(leaf, position, chunk)
    if writer is not None:
        writer.commit(beside)


class _Written:
    """A leaf whose chunks are written already."""


class _WrittenHandler(ocp.type_handlers.TypeHandler):
    """Saves nothing of a leaf that is written; Orbax will read it as an array."""

    def typestr(self) -> str:
        return "jax.Array"

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> list[Any]:
        for info in infos:
            await info.await_path_creation()
        return []

    async def deserialize(self, infos: Any, args: Any = None) -> Any:
        raise ValueError("written leaves are restored as arrays")

    async def metadata(self, infos: Any) -> Any:
        raise ValueError("written leaves are restored as arrays")


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


@contextlib.contextmanager
def _as_os_error(what: object) -> Iterator[None]:
    """TensorStore and Orbax tell of a full disk with a ValueError."""
    try:
        yield
    except ValueError as error:
        raise OSError(f"{what}: {str(error).partition(' [')[0]:.300}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Holds back what Orbax logs: warnings of what is meant, and of errors that it raises, too."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
