"""Files and directories that appear under their name only when they are whole."""

import contextlib
import fcntl
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from glm5_jax.errors import InputError


def refuse_existing(destination: Path) -> None:
    """Raises `InputError` if there is something under a name about to be written."""
    if destination.exists() or destination.is_symlink():
        raise InputError(f"{destination}: exists already, expected a new name")


@contextlib.contextmanager
def new_directory(destination: Path) -> Iterator[Path]:
    """Yields a temporary directory beside `destination` that gets its name at the end.

    If the body fails, the directory is removed and the name stays free.

    Raises:
      InputError: `destination` exists or cannot be written.
    """
    refuse_existing(destination)
    make_parent(destination)
    with named_errors(destination, f".{destination.name}.partial-"):
        temporary = Path(
            tempfile.mkdtemp(prefix=f".{destination.name}.partial-", dir=destination.parent)
        )
        with _unfinished_until_left(temporary):
            yield temporary
            refuse_existing(destination)
            temporary.chmod(0o777 & ~_umask())
            temporary.rename(destination)


@contextlib.contextmanager
def new_file(destination: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside `destination` that gets its name at the end.

    If the body fails, the file is removed and whatever had the name keeps it.

    Raises:
      InputError: `destination` exists and is not to be overwritten, or cannot be written.
    """
    if not overwrite or destination.is_dir():
        refuse_existing(destination)
    make_parent(destination)
    temporary = destination.with_name(f".{destination.name}.partial-{os.getpid()}")
    with (
        named_errors(destination, f".{destination.name}.partial-"),
        _unfinished_until_left(temporary),
    ):
        temporary.touch()  # a folder that cannot be written to is found before any work is done
        yield temporary
        if not overwrite:
            refuse_existing(destination)
        temporary.replace(destination)


@contextlib.contextmanager
def locked(path: Path, refusal: str | None = None) -> Iterator[None]:
    """Holds a lock on a file or folder, which ends with the process however that ends.

    Args:
      refusal: what an error says if another process holds it; it is waited for unless given.

    Raises:
      InputError: another process holds it and is not waited for.
    """
    # Network file systems lock for writing what is opened for writing.
    opened = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | (fcntl.LOCK_NB if refusal else 0))
        except BlockingIOError:
            raise InputError(str(refusal)) from None
        yield
    finally:
        os.close(opened)


def write_all(file: io.FileIO, data: memoryview) -> None:
    """Writes all bytes to a file without a buffer, which may take a part of them at a time."""
    while data:
        data = data[file.write(data) :]


def sync(path: Path) -> None:
    """Has a file or folder written to the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def remove_unfinished() -> None:
    """Removes whatever is being written, for a process that ends without leaving its contexts."""
    for path in list(_unfinished):
        _remove(path)


_unfinished: set[Path] = set()


@contextlib.contextmanager
def _unfinished_until_left(temporary: Path) -> Iterator[None]:
    """Removes what is still there under a temporary name when the body is left."""
    _unfinished.add(temporary)
    try:
        yield
    finally:
        _remove(temporary)
        _unfinished.discard(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def make_parent(destination: Path) -> None:
    """Makes the folders that a name lies in.

    Raises:
      InputError: one of them is a file.
    """
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{destination}: leads through a file, expected folders") from None


@contextlib.contextmanager
def named_errors(destination: Path, temporary: str) -> Iterator[None]:
    """Names what was to be written in errors that name nothing, or a name the user never gave.

    Args:
      temporary: what such a name has in it.
    """
    try:
        yield
    except OSError as error:
        names = (error.filename, error.filename2)  # copying names what it reads first
        if error.filename is None or any(temporary in str(name) for name in names):
            reason = error.strerror or error
            raise InputError(f"{destination}: cannot be written: {reason}") from None
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
