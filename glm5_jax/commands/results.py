"""A file of results, one JSON object per line, that a run may be continued with."""

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from glm5_jax.errors import InputError
from glm5_jax.strict_json import parse_json

Write = Callable[[Mapping[str, Any]], None]


def read_results(path: Path, run: str, prompts: int) -> set[int]:
    """The indices of the results that a file has.

    A last line without an end, as of a run that was killed, does not count.

    Args:
      run: what tells runs with other options apart; every result has it.
      prompts: how many there are.

    Raises:
      InputError: the file has anything but results of this run.
    """
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error}") from None
    done = set()
    for number, line in enumerate(text.split("\n")[:-1], start=1):
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
    return done


@contextlib.contextmanager
def appending(path: Path) -> Iterator[Write]:
    """Gives a function that adds a result to a file; each one is whole, or it is not there.

    Raises:
      InputError: another process does the same.
    """
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path}: another run writes to it, expected one at a time") from None
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)

        def write(record: Mapping[str, Any]) -> None:
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()

        yield write
        os.fsync(file.fileno())
