"""A file of results, one JSON object per line, that a run may be continued with."""

import contextlib
import fcntl
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from glm5_jax.errors import InputError
from glm5_jax.strict_json import parse_json

_BEGINNING = '{"index": '  # of every line


class Results:
    """The results that a file has, to which more can be added."""

    def __init__(self, file: io.FileIO, path: Path, done: set[int]):
        self.done = done  # indices of the results that were there before
        self._file, self._path = file, path

    def add(self, index: int, record: Mapping[str, Any]) -> None:
        """Adds a result. Where the disk is full, a part may be left, which the next run drops."""
        line = json.dumps({"index": index, **record}).encode() + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None


@contextlib.contextmanager
def open_results(path: Path, run: str, prompts: int) -> Iterator[Results]:
    """Opens a file of results, new or of a run that ended early.

    A last line without an end, as of a run that was killed, is dropped.

    Args:
      run: what tells runs with other options apart; every result has it.
      prompts: how many there are.

    Raises:
      InputError: the file has anything but results of this run, or another run writes to it.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is no regular file, expected one or a new name")
    with path.open("a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path}: another run writes to it, expected one at a time") from None
        file.seek(0)
        content = file.read()
        done = _read(content, path, run, prompts)
        file.truncate(content.rfind(b"\n") + 1)
        try:
            yield Results(file, path, done)
        finally:
            os.fsync(file.fileno())
            if not file.tell():
                path.unlink()


def _read(content: bytes, path: Path, run: str, prompts: int) -> set[int]:
    """The indices of the results."""
    try:
        *lines, rest = content.decode().split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error}") from None
    done = set()
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        record = parse_json(line, where)
        index = record.get("index")
        if type(index) is not int or not 0 <= index < prompts or index in done:
            raise InputError(
                f"{where}: index is {index!r:.80}, expected one from 0 to {prompts - 1}, and each "
                "once"
            )
        if record.get("run") != run:
            raise InputError(
                f"{where}: run is {record.get('run')!r:.80}, expected {run!r}: it was made with "
                "another model, other prompts or options; give another --out"
            )
        done.add(index)
    if not rest.startswith(_BEGINNING[: len(rest)]):
        raise InputError(
            f"{path}, line {len(lines) + 1}: is {rest!r:.80}, expected a result of glm5 generate"
        )
    return done
