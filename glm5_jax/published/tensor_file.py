"""An open file of tensors, of whatever format."""

import abc
from types import TracebackType
from typing import Self

import jax.numpy as jnp
import numpy as np

from glm5_jax.errors import InputError
from glm5_jax.published.header import TensorInfo
from glm5_jax.published.storage import Data, Opener, open_storage
from glm5_jax.remote import AnyPath

FLOAT8 = "F8_E4M3"
DTYPES: dict[str, np.dtype] = {  # by the names that safetensors has for them
    "F32": jnp.dtype("float32"),
    "F16": jnp.dtype("float16"),
    "BF16": jnp.dtype("bfloat16"),
    FLOAT8: jnp.dtype("float8_e4m3fn"),
}


class TensorFile(abc.ABC):
    """An open file of tensors, of which rows are read where its header says that they lie."""

    def __init__(self, path: AnyPath, opener: Opener = open_storage):
        """Opens a file and checks its layout.

        Raises:
          Missing: there is no such file.
          InputError: it is truncated, or not laid out as its format demands.
        """
        self.path = path
        self._storage = opener(path)
        self.version = self._storage.version
        try:
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

    def as_rows(self, name: str, data: Data) -> np.ndarray:
        """Bytes of whole rows of a tensor, as an array."""
        info = self.tensors[name]
        return np.frombuffer(data, DTYPES[info.dtype]).reshape(-1, *info.shape[1:])

    def read_bytes(self, offset: int, count: int) -> Data:
        """Reads a part of the file.

        Raises:
          InputError: it cannot be read, or ends too soon.
        """
        return self._storage.read(offset, count)

    def spare(self, count: int) -> int:
        """How much memory reading so many bytes takes for a while, beside themselves."""
        return self._storage.spare(count)

    def require_unchanged(self) -> None:
        """Raises `InputError` if the file was written to since it was opened."""
        if self._storage.current_version() != self.version:
            raise InputError(f"{self.path}: changed while it was read")

    def close(self) -> None:
        """Closes the file."""
        self._storage.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
