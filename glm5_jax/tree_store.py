"""Trees of arrays on disk: an Orbax checkpoint with the digest of every chunk beside it.

Orbax restores a flipped bit without a word and casts to whatever dtype it is asked for; so every
chunk's SHA-256 is kept in a manifest and compared when the chunk is read. Chunks are written and
read one by one, uncompressed, each in a file of its own, with TensorStore as Orbax does: memory is
bounded by a chunk, not by a leaf, and a damaged chunk is named. Orbax gives the tree its metadata
and can restore it on its own.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from glm5_jax.chunks import Layout, Region, overlap
from glm5_jax.errors import InputError
from glm5_jax.mesh import fetch_part
from glm5_jax.sharding import from_parts
from glm5_jax.strict_json import read_json

MANIFEST_NAME = "manifest.json"
_ORBAX_METADATA = "_METADATA"
_FORMAT = "glm5-jax tree 1"


def _file_digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def _digest(chunk: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(chunk).view(np.uint8).data).hexdigest()


class TreeWriter:
    """Writes a tree chunk by chunk, in the first process; `commit` makes it a checkpoint."""

    def __init__(self, directory: Path, leaves: Mapping[str, Layout]):
        """Starts a tree of the given leaves, by path, at a directory that does not exist yet."""
        self._directory = directory
        self._staging = directory.with_name(directory.name + ".staging")
        self._leaves = leaves
        self._digests: dict[str, dict[tuple[int, ...], str]] = {leaf: {} for leaf in leaves}
        with _as_os_error(directory):
            self._stores = {
                leaf: ts.open(_zarr(self._staging / leaf, shape), create=True, open=True).result()
                for leaf, shape in leaves.items()
            }

    def put(self, leaf: str, position: tuple[int, ...], chunk: np.ndarray) -> None:
        """Writes one chunk.

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
        with _as_os_error(leaf):
            self._stores[leaf][region].write(chunk).result()
        self._digests[leaf][position] = _digest(chunk)

    def commit(self, beside: Sequence[str] = ()) -> None:
        """Makes the tree an Orbax checkpoint, with the manifest in its directory.

        Args:
          beside: names of files beside the tree without which it means something else; they are
            verified with it.
        """
        manifest: dict[str, Any] = {
            "format": _FORMAT,
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
        tree = _nested({leaf: _Staged(self._staging / leaf) for leaf in self._leaves})
        registry = ocp.type_handlers.create_type_handler_registry((_Staged, _StagedHandler()))
        with _quiet(), _as_os_error(self._directory):
            alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
            handler = ocp.PyTreeCheckpointHandler(
                use_ocdbt=False,
                use_zarr3=False,
                type_handler_registry=registry,
                multiprocessing_options=alone,
            )
            with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
                checkpointer.save(self._directory.absolute(), tree)
        self._staging.rmdir()
        manifest["metadata_sha256"] = _file_digest(self._directory / _ORBAX_METADATA)
        manifest["beside"] = {name: _file_digest(self._directory.parent / name) for name in beside}
        (self._directory / MANIFEST_NAME).write_text(json.dumps(manifest))


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


class TreeReader:
    """Reads a tree and checks what it reads against the manifest."""

    def __init__(self, directory: Path):
        """Opens a tree.

        Raises:
          InputError: there is no tree, or its manifest or metadata are damaged.
        """
        self.directory = directory
        self.leaves: dict[str, Layout] = {}
        self._digests: dict[str, dict[tuple[int, ...], str]] = {}
        self._stores: dict[str, Any] = {}
        path = directory / MANIFEST_NAME
        manifest = read_json(path)
        if manifest.get("format") != _FORMAT:
            raise InputError(f"{path}: format is {manifest.get('format')!r}, expected {_FORMAT!r}")
        try:
            for leaf, entry in manifest["leaves"].items():
                place = Layout(
                    tuple(entry["shape"]), jnp.dtype(entry["dtype"]), tuple(entry["chunk"])
                )
                digests = zip(place.positions(), entry["sha256"], strict=True)
                self.leaves[leaf] = place
                self._digests[leaf] = dict(digests)
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: damaged: {error!r}") from None
        metadata = directory / _ORBAX_METADATA
        digest = _file_digest(metadata)
        if digest is None or manifest.get("metadata_sha256") != digest:
            raise InputError(f"{metadata}: damaged, its SHA-256 is not the one in {MANIFEST_NAME}")
        beside = manifest.get("beside", {})
        for name, expected in beside.items() if isinstance(beside, dict) else ():
            if _file_digest(directory.parent / name) != expected:
                raise InputError(
                    f"{directory.parent / name}: not as it was written, its SHA-256 is not the one "
                    f"in {path}; if the change is meant, take it out of the object 'beside' there"
                )

    def read(self, leaf: str, position: tuple[int, ...]) -> np.ndarray:
        """Reads and checks one chunk.

        Raises:
          InputError: the chunk is missing or not what was written.
        """
        place = self.leaves[leaf]
        where = f"{self.directory}: leaf {leaf}, chunk {'.'.join(map(str, position)) or '0'}"
        try:
            if leaf not in self._stores:
                spec = _zarr(self.directory / leaf, place)
                self._stores[leaf] = ts.open(spec, open=True).result()
            chunk = np.asarray(self._stores[leaf][place.region(position)].read().result())
        except ValueError as error:
            reason = str(error).partition(" [")[0]
            raise InputError(f"{where}: cannot be read: {reason:.200}") from None
        if _digest(chunk) != self._digests[leaf][position]:
            # A chunk that is not there reads as zeros.
            if not (self.directory / leaf / (".".join(map(str, position)) or "0")).exists():
                raise InputError(f"{where}: is missing")
            raise InputError(f"{where}: damaged, its SHA-256 is not the one in {MANIFEST_NAME}")
        return chunk

    def restore(self, leaf: str, sharding: jax.sharding.Sharding) -> jax.Array:
        """Restores a whole leaf into a sharding, in the dtype it is stored in.

        Only the chunks that this process's devices need are read, several at a time.

        Raises:
          InputError: a chunk is missing or not what was written.
        """
        place = self.leaves[leaf]

        def read_part(wanted: Region) -> np.ndarray:
            array = np.empty([part.stop - part.start for part in wanted], place.dtype)

            def copy(position: tuple[int, ...]) -> None:
                common = overlap(place.region(position), wanted)
                assert common is not None
                in_chunk, in_part = common
                array[in_part] = self.read(leaf, position)[in_chunk]

            spans = (
                range(part.start // size, -(-part.stop // size))
                for part, size in zip(wanted, place.chunk, strict=True)
            )
            with concurrent.futures.ThreadPoolExecutor() as pool:
                for _ in pool.map(copy, itertools.product(*spans)):
                    pass
            return array

        return from_parts(place.shape, sharding, read_part)


@dataclasses.dataclass(frozen=True)
class _Staged:
    """A leaf whose chunks are written already."""

    path: Path


class _StagedHandler(ocp.type_handlers.TypeHandler):
    """Saves a staged leaf by moving it to where Orbax wants it; Orbax then reads it as an array."""

    def typestr(self) -> str:
        return "jax.Array"

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> list[Any]:
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            value.path.rename(info.path)
        return []

    async def deserialize(self, infos: Any, args: Any = None) -> Any:
        raise ValueError("staged leaves are restored as arrays")

    async def metadata(self, infos: Any) -> Any:
        raise ValueError("staged leaves are restored as arrays")


def _zarr(path: Path, place: Layout) -> dict[str, Any]:
    is_native = place.dtype.kind in "fiub" and place.dtype.isbuiltin == 1
    return {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": str(path.absolute())},
        "metadata": {
            "shape": list(place.shape),
            "chunks": list(place.chunk),
            "dtype": place.dtype.str if is_native else place.dtype.name,
            "compressor": None,
        },
    }


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
    """Holds back Orbax's warnings about what is done on purpose here."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
