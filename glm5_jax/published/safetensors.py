"""Reading safetensors files slice by slice, without trusting them.

The safetensors library names one fault of a file and keeps the last of two tensors of one name, and
cannot hand float8 to numpy; so headers are read and checked here. What passes and the library
refuses is refused, too.
"""

import abc
import os
import stat
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from glm5_jax.errors import InputError
from glm5_jax.published.header import LONGEST, TensorInfo, tensors_of
from glm5_jax.strict_json import parse_json

FLOAT8 = "F8_E4M3"
DTYPES: dict[str, np.dtype] = {
    "F32": jnp.dtype("float32"),
    "F16": jnp.dtype("float16"),
    "BF16": jnp.dtype("bfloat16"),
    FLOAT8: jnp.dtype("float8_e4m3fn"),
}


class Version(NamedTuple):
    """What tells whether a file is as it was."""

    size: int  # in bytes
    modified: int  # in nanoseconds of the clock of the file system


class TensorFile(abc.ABC):
    """An open file of tensors, of which rows are read where its header says that they lie."""

    def __init__(self, path: Path):
        """Opens a file and checks its layout.

        Raises:
          InputError: the file is missing, truncated, or not laid out as its format demands.
        """
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # not to wait for pipes
        except OSError as error:
            raise InputError(f"{path}: {error.strerror or error}") from None
        try:
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                raise InputError(f"{path}: not a file")
            self.version = self._current_version()
            self.tensors = self._read_header()
        except BaseException:
            self.close()
            raise

    @abc.abstractmethod
    def _read_header(self) -> dict[str, TensorInfo]:
        """What the file says of its tensors, checked against its size."""

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of a tensor's first axis, in the dtype of the file.

        Raises:
          InputError: the file ends too soon.
        """
        offset, count = self.span(name, start, stop)
        return self.as_rows(name, self.read_bytes(offset, count))

    def span(self, name: str, start: int, stop: int) -> tuple[int, int]:
        """Where rows of a tensor lie: the offset in the file, and how many bytes they are."""
        info = self.tensors[name]
        row_bytes = int(np.prod(info.shape[1:], dtype=np.int64)) * DTYPES[info.dtype].itemsize
        return info.start + start * row_bytes, (stop - start) * row_bytes

    def as_rows(self, name: str, data: bytearray) -> np.ndarray:
        """Bytes of whole rows of a tensor, as an array."""
        info = self.tensors[name]
        return np.frombuffer(data, DTYPES[info.dtype]).reshape(-1, *info.shape[1:])

    def read_bytes(self, offset: int, count: int) -> bytearray:
        """Reads a part of the file.

        Raises:
          InputError: the file ends too soon.
        """
        data = bytearray(count)
        view, end = memoryview(data), offset
        while view:
            try:
                got = os.preadv(self._file, [view], end)
            except OSError as error:
                raise InputError(f"{self.path}: {error.strerror}") from None
            if got == 0:
                raise InputError(f"{self.path}: ends at byte {end:,}, expected more")
            view, end = view[got:], end + got
        return data

    def require_unchanged(self) -> None:
        """Raises `InputError` if the file was written to since it was opened."""
        if self._current_version() != self.version:
            raise InputError(f"{self.path}: changed while it was read")

    def _current_version(self) -> Version:
        found = os.fstat(self._file)
        return Version(found.st_size, found.st_mtime_ns)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class SafetensorsFile(TensorFile):
    """An open safetensors file."""

    def _read_header(self) -> dict[str, TensorInfo]:
        where = f"{self.path}: not a valid safetensors file"
        length = int.from_bytes(os.pread(self._file, 8, 0), "little")
        data_start = 8 + length
        if length > LONGEST or data_start > self.version.size:
            raise InputError(
                f"{where}: its first bytes promise a header of {length:,} bytes, the file has "
                f"{self.version.size:,}; is it truncated?"
            )
        found = parse_json(os.pread(self._file, length, 8), where)
        tensors, faults = tensors_of(found, data_start, self.version.size - data_start)
        if faults:
            raise InputError(f"{where}: {'; '.join(faults)}")
        try:
            with safe_open(self.path, framework="np"):
                pass
        except SafetensorError as error:
            raise InputError(f"{where}: {error}") from None
        return tensors
