"""Opening what was given from outside: no pipe is waited for, no device read, no size believed."""

import os
import stat
from pathlib import Path
from typing import Any

from glm5_jax.errors import InputError
from glm5_jax.remote import AnyPath, RemotePath

# Bytes of a file that is read whole. What is said of GLM-5's weights takes a quarter of it.
_LARGEST = 2**26


def open_plain(path: Path) -> int:
    """Opens a file to be read; returns its descriptor.

    Raises:
      OSError: it cannot be opened, or is a folder, a pipe or a device.
    """
    opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # not to wait for who writes to a pipe
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise OSError(0, "not a file", str(path))
    return opened


def read_plain(path: AnyPath) -> bytes:
    """Reads a small file.

    Raises:
      InputError: it cannot be read, is no file, or is one of more than 64 MiB.
    """
    if isinstance(path, RemotePath):
        _require_small(path, path.version()[0])
        return path.read_bytes()
    try:
        with open(open_plain(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            _require_small(path, size)
            return file.read(size)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None


def _require_small(path: AnyPath, size: int) -> None:
    if size > _LARGEST:
        raise InputError(f"{path}: has {size:,} bytes, expected at most {_LARGEST:,}")


def is_plain_name(name: Any) -> bool:
    """Whether it is the name of a file in a folder, and no path that could lead elsewhere."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and name == os.path.basename(name)
        and name not in ("", ".", "..")
        and "\\" not in name
    )
