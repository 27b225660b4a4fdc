"""Where the bytes of a file come from."""

import contextlib
import functools
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from glm5_jax.errors import InputError, Missing
from glm5_jax.plain_files import open_plain
from glm5_jax.remote import AnyPath, RemotePath

Data = bytes | bytearray
_BLOCK = 2**18  # bytes that are fetched together for small reads over a network


class Version(NamedTuple):
    """What tells whether a file is as it was."""

    size: int  # in bytes
    modified: int | str  # in nanoseconds of the clock of the file system, or its word for a version


class Storage(Protocol):
    """An open file."""

    version: Version  # when it was opened

    def read(self, offset: int, count: int) -> Data:
        """A part of the file.

        Raises:
          InputError: it cannot be read, or ends too soon.
        """

    def spare(self, count: int) -> int:
        """How much memory reading so many bytes takes for a while, beside themselves."""

    def current_version(self) -> Version:
        """What the file is now."""

    def local_file(self, header: Data) -> contextlib.AbstractContextManager[Path]:
        """A file on this machine that has the same size, and starts with the same header."""

    def close(self) -> None:
        """Closes the file."""


Opener = Callable[[AnyPath], Storage]


def open_storage(path: AnyPath) -> Storage:
    """Opens a file.

    Raises:
      Missing: there is none.
      InputError: it cannot be opened.
    """
    return RemoteStorage(path) if isinstance(path, RemotePath) else LocalStorage(path)


class LocalStorage:
    """A file of this machine, which stays readable when its name goes."""

    def __init__(self, path: Path):
        self._path = path
        try:
            self._file = open_plain(path)
        except OSError as error:
            kind = Missing if isinstance(error, FileNotFoundError) else InputError
            raise kind(f"{path}: {error.strerror or error}") from None
        self.version = self.current_version()

    def read(self, offset: int, count: int) -> bytearray:
        data = bytearray(count)
        view, end = memoryview(data), offset
        while view:
            try:
                got = os.preadv(self._file, [view], end)
            except OSError as error:
                raise InputError(f"{self._path}: {error.strerror}") from None
            if got == 0:
                raise ends_too_soon(self._path, end)
            view, end = view[got:], end + got
        return data

    def spare(self, count: int) -> int:
        return 0

    def current_version(self) -> Version:
        found = os.fstat(self._file)
        return Version(found.st_size, found.st_mtime_ns)

    def local_file(self, header: Data) -> contextlib.AbstractContextManager[Path]:
        return contextlib.nullcontext(self._path)

    def close(self) -> None:
        os.close(self._file)


class RemoteStorage:
    """A file that is read over the network.

    Every read is a request of its own, but for small ones: scales, of which there are as many as
    matrices, lie side by side.
    """

    def __init__(self, path: RemotePath):
        self._path = path
        self.version = Version(*path.version())
        self._block = functools.lru_cache(maxsize=1)(self._fetch_block)

    def read(self, offset: int, count: int) -> Data:
        if count > _BLOCK // 4:
            return self._fetch(offset, count)
        if offset + count > self.version.size:
            raise ends_too_soon(self._path, self.version.size)
        first, last = offset // _BLOCK, (offset + count - 1) // _BLOCK
        data = b"".join(self._block(number) for number in range(first, last + 1))
        return data[offset - first * _BLOCK :][:count]

    def _fetch_block(self, number: int) -> Data:
        start = number * _BLOCK
        return self._fetch(start, min(_BLOCK, self.version.size - start))

    def _fetch(self, offset: int, count: int) -> Data:
        data: Data = b""
        while len(data) < count:
            end = offset + len(data)
            part = self._path.read_part(end, offset + count)
            if not part:
                raise ends_too_soon(self._path, end)
            if len(part) > offset + count - end:
                raise InputError(
                    f"{self._path}: {len(part):,} bytes came where {offset + count - end:,} were "
                    "asked for; does the server serve parts of files?"
                )
            data = data + part if data else part
        return data

    def spare(self, count: int) -> int:
        return count  # what came in pieces is joined

    def current_version(self) -> Version:
        return Version(*self._path.version(fresh=True))

    def local_file(self, header: Data) -> contextlib.AbstractContextManager[Path]:
        return hollow_file(header, self.version.size)

    def close(self) -> None:
        """Nothing stays open."""


class StorageReader(io.RawIOBase):
    """What reads files, given a storage."""

    def __init__(self, storage: Storage):
        super().__init__()
        self._storage = storage
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._storage.version.size}
        self._at = max(0, start[whence] + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._storage.version.size - self._at))
        buffer[:count] = self._storage.read(self._at, count) if count else b""
        self._at += count
        return count


@contextlib.contextmanager
def hollow_file(header: Data, size: int) -> Iterator[Path]:
    """A temporary file of a size that takes no more space than what it starts with."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(header)
        file.truncate(size)
        file.flush()
        yield Path(file.name)


def ends_too_soon(path: AnyPath, end: int) -> InputError:
    """The error that a file is shorter than it was said to be."""
    return InputError(f"{path}: ends at byte {end:,}, expected more")
