"""Deleting a source's shards once they are converted, where a disk cannot hold both checkpoints.

Of a shard that is gone, the workspace keeps a stand-in: what it started with, and the tensors that
another shard's weights need. Before anything is deleted, a stand-in, all that was made of the shard
and the word that it was made are on the disk.
"""

import contextlib
import functools
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from convert.conversion import Effort
from convert.workspace import Workspace, stand_ins_of
from glm5_jax.atomic import sync
from glm5_jax.errors import InputError, Missing
from glm5_jax.published.safetensors import FIRST_READ, SafetensorsFile
from glm5_jax.published.source import PublishedSource
from glm5_jax.published.storage import (
    Data,
    LocalStorage,
    Opener,
    Version,
    hollow_file,
    open_storage,
)
from glm5_jax.published.subset import WHOLE, Subset
from glm5_jax.remote import AnyPath, RemotePath
from glm5_jax.strict_json import parse_json

_DIGEST_BYTES = hashlib.sha256().digest_size


def check_deletion(directory: AnyPath, effort: Effort, subset: Subset) -> None:
    """Raises `InputError` if shards are to be deleted that cannot or may not be."""
    if not effort.delete_source_shards:
        return
    if isinstance(directory, RemotePath):
        raise InputError(
            f"{directory}: is not on this machine, expected so with --delete-source-shards"
        )
    if subset != WHOLE:
        raise InputError(
            "--layers and --experts leave weights out, which would be gone; expected neither with "
            "--delete-source-shards"
        )
    if effort.strict:
        raise InputError(
            "--strict may refuse a checkpoint whose shards are gone by then; expected it without "
            "--delete-source-shards"
        )


def opener_for(destination: Path, effort: Effort) -> Opener:
    """How to open shards that are being deleted, or were when the conversion was begun."""
    folder = stand_ins_of(destination)
    if not effort.delete_source_shards and not os.path.exists(folder):  # bears any name
        return open_storage

    def opened(path: AnyPath) -> DeletableStorage:
        assert isinstance(path, Path)
        return DeletableStorage(path, folder / path.name)

    return opened


class DeletableStorage:
    """A file that another process may delete, or its stand-in.

    It is opened anew for everything that is read, for the disk has no room for a file that has no
    name but is open.
    """

    def __init__(self, path: Path, stand_in: Path):
        self._path = path
        self._stand_in = stand_in
        self.version = self.current_version()

    def read(self, offset: int, count: int) -> Data:
        with self._opened() as storage:
            if storage.version != self.version:
                raise InputError(f"{self._path}: changed while it was read")
            return storage.read(offset, count)

    def spare(self, count: int) -> int:
        return 0

    def current_version(self) -> Version:
        with self._opened() as storage:
            return storage.version

    def local_file(self, header: Data) -> contextlib.AbstractContextManager[Path]:
        return hollow_file(header, self.version.size)

    def close(self) -> None:
        """Nothing stays open."""

    @contextlib.contextmanager
    def _opened(self) -> "Iterator[LocalStorage | _StandIn]":
        storage: LocalStorage | _StandIn
        try:
            storage = LocalStorage(self._path)
        except Missing:
            if not self._stand_in.exists():
                raise
            storage = _StandIn(self._path, self._stand_in)
        with contextlib.closing(storage):
            yield storage


class _StandIn:
    """What was kept of a deleted shard.

    It is a length, JSON of that length, the parts one by one, and the SHA-256 of all that: what
    was damaged meanwhile is nowhere else.
    """

    def __init__(self, shard: Path, path: Path):
        self._shard = shard
        self._file = LocalStorage(path)
        try:
            self._start, said = _checked(path, self._file.version)
        except BaseException:
            self.close()
            raise
        self._kept = said["kept"]
        self.version = Version(said["size"], said["modified"])

    def read(self, offset: int, count: int) -> Data:
        place = self._start
        for start, size in self._kept:
            if start <= offset and offset + count <= start + size:
                return self._file.read(place + offset - start, count)
            place += size
        raise InputError(f"{self._shard}: was deleted once it was converted, and is needed again")

    def close(self) -> None:
        self._file.close()


@functools.cache
def _checked(path: Path, version: Version) -> tuple[int, dict[str, Any]]:
    """Where the parts begin in a stand-in, and what stands before them; read once.

    Raises:
      InputError: it is damaged.
    """
    with contextlib.closing(LocalStorage(path)) as file:
        whole = memoryview(file.read(0, version.size))
    held, digest = whole[:-_DIGEST_BYTES], whole[-_DIGEST_BYTES:]
    if hashlib.sha256(held).digest() != digest:
        raise InputError(f"{path}: damaged, its SHA-256 is not the one at its end")
    start = 8 + int.from_bytes(held[:8], "little")
    return start, parse_json(held[8:start], str(path))


class Deletion:
    """Deletes the shards of a conversion, if it is to."""

    def __init__(self, source: PublishedSource, workspace: Workspace, effort: Effort):
        """Has all that a workspace holds written to the disk, down to the names of folders.

        Raises:
          InputError: a shard lies where nothing may be deleted, or is of another format.
        """
        self._files = {file.path.name: file for file in source.files()}
        self._needed = source.needed_elsewhere()
        self._workspace = workspace
        self._folder = stand_ins_of(workspace.destination)
        self._wanted = effort.delete_source_shards
        self.freed = 0.0  # bytes that the destination's disk gains for each one that is deleted
        if not self._wanted:
            return
        others = [name for name, f in self._files.items() if not isinstance(f, SafetensorsFile)]
        if others:
            raise InputError(
                f"{', '.join(others)}: expected safetensors with --delete-source-shards, of which "
                "what is needed again can be kept"
            )
        folders = sorted({path.resolve().parent for path in self._paths()})
        if closed := [str(folder) for folder in folders if not os.access(folder, os.W_OK)]:
            raise InputError(f"{', '.join(closed)}: nothing may be deleted there")
        disks = {folder.stat().st_dev for folder in (*folders, workspace.directory)}
        self.freed = 1.0 if len(disks) == 1 else 0.0
        self._folder.mkdir(exist_ok=True)
        sync(workspace.directory.parent)
        for folder, _, names in os.walk(workspace.directory):
            for name in (".", *names):
                with contextlib.suppress(FileNotFoundError):  # of what another process does
                    sync(Path(folder, name))

    def _paths(self) -> list[Path]:
        return [file.path for file in self._files.values() if isinstance(file.path, Path)]

    @property
    def num_deleted(self) -> int:
        """How many shards are gone, whichever run deleted them."""
        return sum(not path.exists() for path in self._paths())

    def catch_up(self) -> None:
        """Deletes the shards that are converted and were left by a process that was killed."""
        if not self._wanted:
            return
        for shard in self._workspace.durable_records():
            self._workspace.look_once(lambda: None)  # as whoever has finished a shard did
            self.delete(shard)

    def delete(self, shard: str) -> None:
        """Deletes a shard whose record is on the disk; of a link, what it leads to as well."""
        file = self._files[shard]
        path = file.path
        if not self._wanted or not isinstance(path, Path) or not isinstance(file, SafetensorsFile):
            return
        if path.exists():
            self._keep(file)
        path.resolve().unlink(missing_ok=True)  # first, for it is found through the link
        path.unlink(missing_ok=True)

    def _keep(self, file: SafetensorsFile) -> None:
        """Writes the stand-in of a shard."""
        start = max(file.data_start, min(FIRST_READ, file.version.size))
        parts = [(0, start)]
        parts += [
            file.span(name, 0, file.tensors[name].shape[0])
            for name in file.tensors
            if name in self._needed
        ]
        said = {"size": file.version.size, "modified": file.version.modified, "kept": parts}
        text = json.dumps(said).encode()
        name = f".{file.path.name}-{os.getpid()}-{threading.get_ident()}"
        unfinished = self._folder / name
        digest = hashlib.sha256()
        with unfinished.open("wb") as out:

            def write(data: Data) -> None:
                digest.update(data)
                out.write(data)

            write(len(text).to_bytes(8, "little") + text)
            for offset, count in parts:
                write(file.read_bytes(offset, count))
            out.write(digest.digest())
        sync(unfinished)
        unfinished.replace(self._folder / file.path.name)
        sync(self._folder)
