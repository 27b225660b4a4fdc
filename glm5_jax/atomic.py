"""Files and directories that appear under their name only when they are whole."""

import contextlib
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
      InputError: `destination` exists.
    """
    refuse_existing(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(
        tempfile.mkdtemp(prefix=f".{destination.name}.partial-", dir=destination.parent)
    )
    try:
        yield temporary
        refuse_existing(destination)
        temporary.chmod(0o777 & ~_umask())
        temporary.rename(destination)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def new_file(destination: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside `destination` that gets its name at the end.

    If the body fails, the file is removed and whatever had the name keeps it.

    Raises:
      InputError: `destination` exists and is not to be overwritten.
    """
    if not overwrite:
        refuse_existing(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = destination.with_name(f".{destination.name}.partial-{os.getpid()}")
    try:
        yield temporary
        if not overwrite:
            refuse_existing(destination)
        temporary.replace(destination)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
