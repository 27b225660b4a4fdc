"""Tokens on disk: written one after the other to files of bounded size, read from any place."""

import bisect
import functools
import hashlib
import io
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self

import numpy as np

from glm5_jax.errors import InputError

SHARD_TOKENS = 2**27  # at most in a file
_OPEN_SHARDS = 256  # at once, as every one takes up a file descriptor
_HEADER_BYTES = 128  # of a file; NumPy pads it, so that it can be written again with another length


class Shard(NamedTuple):
    """What is written down of a file of tokens."""

    tokens: int
    sha256: str


def token_dtype(vocab_size: int) -> "np.dtype[np.unsignedinteger]":
    """The dtype that tokens have on disk."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def shard_path(directory: Path, source: str, split: str, number: int) -> Path:
    """Where a shard is."""
    return directory / f"{source}-{split}-{number:05d}.npy"


class ShardWriter:
    """Writes the tokens of a split of a source, as they come."""

    def __init__(
        self,
        directory: Path,
        source: str,
        split: str,
        dtype: "np.dtype[np.unsignedinteger]",
        shard_tokens: int = SHARD_TOKENS,
    ):
        self.shards: list[Shard] = []  # those that are whole
        self._place = (directory, source, split)
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._file: BinaryIO | None = None
        self._held = 0  # tokens in the file

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        """Makes the last shard whole, unless something failed."""
        if self._file is None:
            return
        if kind is None:
            self._finish(self._file)
        else:
            self._file.close()

    def write(self, tokens: Sequence[int]) -> None:
        """Adds tokens, to the next file where one is full."""
        left = np.array(tokens, self._dtype)
        while len(left):
            file = self._file or self._begin()
            part, left = np.split(left, [self._shard_tokens - self._held])
            file.write(part.data)
            self._held += len(part)
            if self._held == self._shard_tokens:
                self._finish(file)

    def _begin(self) -> BinaryIO:
        self._file = shard_path(*self._place, len(self.shards)).open("wb")
        self._file.write(_header(self._dtype, 0))
        return self._file

    def _finish(self, file: BinaryIO) -> None:
        self._file = None
        with file:
            file.seek(0)
            file.write(_header(self._dtype, self._held))
        self.shards.append(Shard(self._held, _digest(Path(file.name))))
        self._held = 0


def _header(dtype: "np.dtype[np.unsignedinteger]", tokens: int) -> bytes:
    """What a file of tokens begins with; as long whatever their number is."""
    file = io.BytesIO()
    described = {"descr": dtype.str, "fortran_order": False, "shape": (tokens,)}
    np.lib.format.write_array_header_1_0(file, described)
    assert file.tell() == _HEADER_BYTES
    return file.getvalue()


def check_shard(
    path: Path, shard: Shard, dtype: "np.dtype[np.unsignedinteger]", *, whole: bool
) -> None:
    """Raises `InputError` if a shard is not as it was written.

    Args:
      whole: read all of it; otherwise only its length and dtype are compared.
    """
    # Not parsed: NumPy has more errors for what is no header than one would think.
    header = _header(dtype, shard.tokens)
    try:
        with path.open("rb") as file:
            is_whole = file.read(len(header)) == header
            is_whole &= file.seek(0, os.SEEK_END) == len(header) + shard.tokens * dtype.itemsize
    except FileNotFoundError:
        raise _not_as_prepared(path, "missing") from None
    if not is_whole or (whole and _digest(path) != shard.sha256):
        raise _not_as_prepared(path, "damaged")


class Tokens:
    """Tokens of shards one after the other, memory-mapped."""

    def __init__(self, shards: Sequence[tuple[Path, int]], dtype: "np.dtype[np.unsignedinteger]"):
        """Takes the path of each shard and how many tokens it holds."""
        self._shards = shards
        self._dtype = dtype
        self._ends = list(itertools.accumulate(tokens for _, tokens in shards))
        self._open = functools.lru_cache(_OPEN_SHARDS)(self._map)

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens from `start` to before `stop`, int32.

        Raises:
          InputError: a shard is not there any more, or too short.
        """
        parts = []
        number = bisect.bisect_right(self._ends, start)
        while start < stop:
            end = self._ends[number]
            begin = self._ends[number - 1] if number else 0
            parts.append(self._open(number)[start - begin : stop - begin])
            start, number = end, number + 1
        return np.concatenate(parts, dtype=np.int32, casting="unsafe")

    def _map(self, number: int) -> np.ndarray:
        """Opens a shard without parsing its header.

        NumPy reads that as Python code, which several threads cannot do at once: CPython 3.11
        fails with "AST constructor recursion depth mismatch" (its issue 106905).
        """
        path, tokens = self._shards[number]
        try:
            return np.memmap(path, self._dtype, "r", offset=_HEADER_BYTES, shape=(tokens,))
        except FileNotFoundError:
            raise _not_as_prepared(path, "missing") from None
        except ValueError:  # it is too short
            raise _not_as_prepared(path, "damaged") from None


def _not_as_prepared(path: Path, what: str) -> InputError:
    return InputError(f"{path}: {what}, expected it as it was prepared")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
