"""A line for every shard that a process has finished with, and what all processes have said."""

import contextlib
import json
import os
import threading
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from glm5_jax.atomic import write_all
from glm5_jax.errors import InputError
from glm5_jax.strict_json import parse_json

Record = dict[str, Any]
_NAME = "done-{}.jsonl"


class Journal:
    """The file that one process writes."""

    def __init__(self, path: Path):
        """Opens a file that is there."""
        self._path = path
        self._writing = threading.Lock()
        whole = path.read_bytes()
        os.truncate(path, whole.rfind(b"\n") + 1)  # a kill may have cut off the last line

    def write(self, record: Record) -> None:
        """Adds a line, which is on the disk then."""
        line = _text(record | {"crc32": zlib.crc32(_text(record))}) + b"\n"
        with self._writing, self._path.open("ab", buffering=0) as file:
            end = file.tell()
            try:
                write_all(file, memoryview(line))
            except OSError:
                os.truncate(self._path, end)  # lest another thread's line follows a part of this
                raise
            os.fsync(file.fileno())


def journal_path(directory: Path, process: int) -> Path:
    """The file of a process."""
    return directory / _NAME.format(process)


def journals(directory: Path) -> list[Path]:
    """The files of all processes that were there."""
    return sorted(directory.glob(_NAME.format("*")))


def read_journals(directory: Path, keys: Collection[str]) -> dict[str, Record]:
    """Lines of all processes, by shards; what a damaged one says was done is to be done again.

    Args:
      keys: of a record, beside those that all have.
    """
    wanted = {"shard", "size", "sha256", *keys}
    records: dict[str, Record] = {}
    for path in journals(directory):
        try:
            lines = path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:  # another process has finished, and removes the folder
            continue
        for line in lines:
            if not line.endswith(b"\n"):  # it is being written, or was when it was cut off
                continue
            with contextlib.suppress(InputError):
                record = parse_json(line, str(path))
                sound = record.pop("crc32", None) == zlib.crc32(_text(record))
                if sound and record.keys() >= wanted:
                    records[str(record["shard"])] = record
    return records


def _text(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode()
