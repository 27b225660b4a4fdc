"""Documents to train on: files of text, by default the Python standard library's own source."""

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from glm5_jax.errors import InputError

# Of the standard library, its tests are more than half, and all alike.
_SKIPPED_FOLDERS = {"site-packages", "__pycache__", "test", "tests"}


class Document(NamedTuple):
    """One text, and whether it is kept from training."""

    name: str
    text: str
    held_out: bool


def standard_library() -> Path:
    """The folder of the running Python's standard library: real text on every machine."""
    return Path(sysconfig.get_paths()["stdlib"])


def read_documents(
    roots: Sequence[Path], pattern: str, held_out: float, max_bytes: int | None
) -> Iterator[Document]:
    """Reads files in an order that looks random but is the same everywhere.

    Args:
      roots: files, and folders that are searched for files of the given pattern.
      held_out: the share of documents kept from training.
      max_bytes: stop when this much has been read.

    Raises:
      InputError: a root does not exist, or there is no text under the roots.
    """
    files = []
    for root in roots:
        if not root.exists():
            raise InputError(f"{root}: no such file or folder")
        found = [root] if root.is_file() else root.rglob(pattern)
        files += [(path.relative_to(root.parent).as_posix(), path) for path in found]
    total = 0
    for name, path in sorted(files, key=lambda file: _shuffle(file[0])):
        if _SKIPPED_FOLDERS & set(Path(name).parts):
            continue
        data = path.read_bytes()
        if max_bytes is not None and total + len(data) > max_bytes:
            continue
        try:
            text = data.decode()
        except UnicodeDecodeError:
            continue  # the standard library keeps files in other encodings to test them
        if text.strip():
            total += len(data)
            yield Document(name, text, _shuffle("split " + name) < held_out)
    if total == 0:
        raise InputError(f"{', '.join(map(str, roots))}: no text in files {pattern}")


def _shuffle(name: str) -> float:
    """A number from 0 to 1 that depends on nothing but the name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
