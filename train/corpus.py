"""Documents to train on: files of text, by default the Python standard library's own source."""

import hashlib
import sysconfig
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from glm5_jax.console import notice
from glm5_jax.errors import InputError
from train.records import Record, holds_records, read_records

# Of the standard library, its tests are more than half, and all alike.
STANDARD_LIBRARY_SKIP = frozenset({"site-packages", "__pycache__", "test", "tests"})


class File(NamedTuple):
    """A file, where it really is, and its name under the root that it was found in."""

    path: Path
    name: str


class Document(NamedTuple):
    """One text, and whether it is kept from training."""

    name: str
    text: str
    held_out: bool
    size: int = 0  # bytes of its file that it takes up


def standard_library() -> Path:
    """The folder of the running Python's standard library: real text on every machine."""
    return Path(sysconfig.get_paths()["stdlib"])


def find_files(roots: Sequence[Path], pattern: str, skip: Collection[str] = ()) -> list[File]:
    """Finds files, none twice, in an order that looks random but is the same everywhere.

    Args:
      roots: files, and folders that are searched for files of the given pattern.
      skip: names of folders under the roots that are not searched.

    Raises:
      InputError: a root does not exist, there cannot be files of such a pattern, or there are none.
    """
    names: dict[Path, str] = {}
    for root in roots:
        for path in _find(root, pattern, skip):
            names.setdefault(path.resolve(), path.relative_to(root.parent).as_posix())
    if not names:
        raise InputError(f"{', '.join(map(str, roots))}: no files {pattern}")
    return sorted((File(*item) for item in names.items()), key=lambda file: _shuffle(file.name))


def read_documents(
    files: Sequence[File], held_out: float, max_bytes: int | None = None, field: str = "text"
) -> Iterator[Document]:
    """Reads documents one by one: whole files, or the records of those that hold records.

    Files that are not UTF-8 are left out, with a notice.

    Args:
      held_out: the share of documents kept from training, chosen by their names alone.
      max_bytes: of text to read; what does not fit in any more is left out.
      field: of records, the one that holds the text.

    Raises:
      InputError: a record is malformed, or there is no text.
    """
    total = 0
    undecodable: list[Path] = []
    for file in files:
        for record in _records(file.path, field, undecodable):
            size = len(record.text.encode())
            if max_bytes is not None and total + size > max_bytes:
                break  # the rest of this file; a smaller one may still fit in
            if record.text.strip():
                total += size
                name = f"{file.name}:{record.number}" if record.number else file.name
                chosen = _shuffle("split " + name) < held_out
                yield Document(name, record.text, chosen, record.size)
    if undecodable:
        those = "1 file is" if len(undecodable) == 1 else f"{len(undecodable)} files are"
        notice(f"{those} not UTF-8 and left out, the first is {undecodable[0]}")
    if total == 0:
        limit = "" if max_bytes is None else f" of at most {max_bytes} bytes"
        raise InputError(f"no text{limit} in {len(files)} files, the first is {files[0].path}")


def _records(path: Path, field: str, undecodable: list[Path]) -> Iterator[Record]:
    """The records of a file; another file is one, without a number, if it is UTF-8."""
    if holds_records(path):
        yield from read_records(path, field)
        return
    data = path.read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError:
        undecodable.append(path)
    else:
        yield Record(0, text, len(data))


def _find(root: Path, pattern: str, skip: Collection[str]) -> list[Path]:
    """The file that a root is, or the files of the pattern in its folders, in a fixed order."""
    if not root.exists():
        raise InputError(f"{root}: no such file or folder")
    if root.is_file():
        return [root]
    try:
        found = sorted(root.rglob(pattern)) if pattern else None
    except (NotImplementedError, ValueError):
        found = None
    if found is None:
        raise InputError(f"--pattern is {pattern!r}, expected one of names of files, like '*.py'")
    return [
        path
        for path in found
        if path.is_file() and set(skip).isdisjoint(path.relative_to(root).parent.parts)
    ]


def _shuffle(name: str) -> float:
    """A number from 0 to 1 that depends on nothing but the name."""
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
