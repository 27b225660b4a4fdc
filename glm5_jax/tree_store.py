"""Trees of arrays on disk: an Orbax checkpoint with the digest of every chunk beside it.

Orbax restores a flipped bit without a word and casts to whatever dtype it is asked for; so every
chunk's SHA-256 is kept in a manifest and compared when the chunk is read. Chunks are written and
read one by one, uncompressed, each in a file of its own: memory is bounded by a chunk, not by a
leaf, and a damaged chunk is named. Orbax and TensorStore give the tree its metadata and can restore
it on their own; chunks are read and written without them, who would copy them twice.
"""

import concurrent.futures
import hashlib
import itertools
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm5_jax.chunks import Layout, Region, overlap
from glm5_jax.errors import InputError
from glm5_jax.plain_files import is_plain_name, open_plain, read_plain
from glm5_jax.sharding import from_parts
from glm5_jax.strict_json import parse_json, read_json

MANIFEST_NAME = "manifest.json"
METADATA_NAME = "_METADATA"  # Orbax's
FORMAT = "glm5-jax tree 1"


def file_digest(path: Path) -> str | None:
    """The SHA-256 of a small file; None if there is none."""
    return hashlib.sha256(read_plain(path)).hexdigest() if path.exists() else None


def chunk_digest(chunk: np.ndarray) -> str:
    """The SHA-256 of a chunk's elements, as they lie in memory."""
    return hashlib.sha256(np.ascontiguousarray(chunk).view(np.uint8).data).hexdigest()


def chunk_name(position: tuple[int, ...]) -> str:
    """The name of a chunk's file, in the folder of its leaf."""
    return ".".join(map(str, position)) or "0"


def zarr_spec(path: Path, place: Layout) -> dict[str, Any]:
    """What TensorStore is to open for a leaf."""
    is_native = place.dtype.kind in "fiub" and place.dtype.isbuiltin == 1
    return {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": str(path.absolute())},
        "metadata": {
            "shape": list(place.shape),
            "chunks": list(place.chunk),
            "dtype": place.dtype.str if is_native else place.dtype.name,
            "compressor": None,
            "dimension_separator": ".",
            "fill_value": None,
            "filters": None,
            "order": "C",
            "zarr_format": 2,
        },
    }


def _is_sound(place: Layout) -> bool:
    """Whether chunks could cover a leaf."""
    sizes = zip(place.shape, place.chunk, strict=True)
    return all(type(size) is int and type(part) is int and 0 < part <= size for size, part in sizes)


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
        self._opened: set[str] = set()
        path = directory / MANIFEST_NAME
        text = read_plain(path)
        self.digest = hashlib.sha256(text).hexdigest()  # of the manifest, and so of all the tree
        manifest = parse_json(text, str(path))
        found = manifest.get("format")
        if found != FORMAT:
            raise InputError(f"{path}: format is {found!r:.80}, expected {FORMAT!r}")
        try:
            for leaf, entry in manifest["leaves"].items():
                place = Layout(
                    tuple(entry["shape"]), jnp.dtype(entry["dtype"]), tuple(entry["chunk"])
                )
                if not _is_sound(place):
                    raise ValueError(f"chunks of {list(place.chunk)} in {list(place.shape)}")
                if math.prod(place.grid) != len(entry["sha256"]):  # there may be any number
                    raise ValueError(f"{len(entry['sha256'])} digests of {place.grid} chunks")
                digests = zip(place.positions(), entry["sha256"], strict=True)
                self.leaves[leaf] = place
                self._digests[leaf] = dict(digests)
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: damaged: {error!r:.200}") from None
        metadata = directory / METADATA_NAME
        digest = file_digest(metadata)
        if digest is None or manifest.get("metadata_sha256") != digest:
            raise InputError(f"{metadata}: damaged, its SHA-256 is not the one in {MANIFEST_NAME}")
        beside = manifest.get("beside")
        if not isinstance(beside, dict) or not all(map(is_plain_name, beside)):
            raise InputError(
                f"{path}: beside is {beside!r:.80}, expected names of files and digests"
            )
        for name, expected in beside.items():
            if file_digest(directory.parent / name) != expected:
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
        where = f"{self.directory}: leaf {leaf}, chunk {chunk_name(position)}"
        self._require_zarr(leaf)
        try:
            opened = open_plain(self.directory / leaf / chunk_name(position))
            with open(opened, "rb", buffering=0) as file:
                size = os.fstat(opened).st_size
                if size != place.chunk_bytes:
                    expected = f"expected {place.chunk_bytes:,}"
                    raise InputError(f"{where}: damaged, has {size:,} bytes, {expected}")
                stored = np.empty(place.chunk, place.dtype)
                view = stored.reshape(-1).view(np.uint8).data
                while view and (count := file.readinto(view)):
                    view = view[count:]
        except FileNotFoundError:
            raise InputError(f"{where}: is missing") from None
        except OSError as error:
            raise InputError(f"{where}: cannot be read: {error.strerror}") from None
        region = place.region(position)  # the last one of an axis is padded on the disk
        chunk = stored[tuple(slice(part.stop - part.start) for part in region)]
        if chunk_digest(chunk) != self._digests[leaf][position]:
            raise InputError(f"{where}: damaged, its SHA-256 is not the one in {MANIFEST_NAME}")
        return chunk

    def _require_zarr(self, leaf: str) -> None:
        """Looks, once for a leaf, whether what Orbax reads it by says what the manifest says."""
        if leaf in self._opened:
            return
        path = self.directory / leaf / ".zarray"
        if read_json(path) != zarr_spec(path.parent, self.leaves[leaf])["metadata"]:
            raise InputError(f"{path}: damaged, is not what was written with {MANIFEST_NAME}")
        self._opened.add(leaf)

    def restore(self, leaf: str, sharding: jax.sharding.Sharding) -> jax.Array:
        """Restores a whole leaf into a sharding, in the dtype it is stored in.

        Only the chunks that this process's devices need are read.

        Raises:
          InputError: a chunk is missing or not what was written.
        """
        return from_parts(
            self.leaves[leaf].shape, sharding, lambda wanted: self.read_region(leaf, wanted)
        )

    def read_region(self, leaf: str, wanted: Region) -> np.ndarray:
        """Reads and checks the chunks that a part of a leaf is in, several at a time.

        Raises:
          InputError: a chunk is missing or not what was written.
        """
        place = self.leaves[leaf]
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
