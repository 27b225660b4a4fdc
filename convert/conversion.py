"""What conversions in both directions share."""

import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from convert.workspace import Share, refuse_finished
from glm5_jax.chunks import CHUNK_BYTES
from glm5_jax.commands.arguments import report_unknown_keys
from glm5_jax.console import notice
from glm5_jax.errors import InputError
from glm5_jax.published.families import printable
from glm5_jax.published.native import NativeSource
from glm5_jax.published.source import PublishedSource
from glm5_jax.remote import AnyPath


def quarter_of_memory() -> int:
    """A quarter of the machine's memory, in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4


@dataclasses.dataclass(frozen=True)
class Effort:
    """How a conversion is gone about; what comes of it does not depend on this."""

    memory: int = dataclasses.field(default_factory=quarter_of_memory)  # bytes in hand at most
    num_threads: int = dataclasses.field(default_factory=lambda: os.cpu_count() or 1)
    share: Share = Share()
    restart: bool = False  # begin anew where a conversion was begun
    delete_source_shards: bool = False  # each once it is converted
    strict: bool = False  # refuse weights that are NaN or infinite, which are told of otherwise


DEFAULT_EFFORT = Effort()


class Outline(NamedTuple):
    """What a conversion will do."""

    num_units: int  # of what is done and noted together
    num_tensors: int
    num_chunks: int  # of the native side
    bytes_read: int
    bytes_written: int
    units: str = "shards"  # of the published side, unless there is none

    def lines(self, destination: Path, effort: Effort) -> Iterator[str]:
        """For a reader."""
        free = _free_at(destination)
        yield f"{self.num_tensors:,} tensors in {self.num_units:,} {self.units}"
        yield f"{self.num_chunks:,} chunks of at most {CHUNK_BYTES // 2**20} MiB"
        yield f"{self.bytes_read:,} bytes to read"
        yield f"{self.bytes_written:,} bytes to write, where {free:,} are free"
        at_a_time = f"{effort.num_threads} {self.units} at a time"
        yield f"at most {effort.memory:,} bytes in hand, of {at_a_time}"


def _free_at(destination: Path) -> int:
    """Bytes that can be written there."""
    folder = destination.absolute().parent
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_room(destination: Path, num_bytes: int) -> None:
    """Raises `InputError` if so many bytes do not fit on the disk."""
    free = _free_at(destination)
    if num_bytes > free:
        raise InputError(
            f"{destination}: {num_bytes:,} bytes are to be written, where {free:,} are free"
        )


class Converted(NamedTuple):
    """What a conversion moved."""

    num_tensors: int
    num_bytes: int  # as written
    num_deleted: int = 0  # shards of the source


def check_destination(destination: Path, source: AnyPath) -> None:
    """Raises `InputError` if a checkpoint cannot be put there."""
    refuse_finished(destination)
    if source.resolve() in Path(os.path.realpath(destination)).parents:  # bears loops of links
        raise InputError(f"{destination}: lies within {source}, expected a place outside it")


def copy_along(source: AnyPath, content: Path) -> None:
    """Copies what is written about a model for people."""
    for name in ("README.md", "LICENSE"):
        if (source / name).is_file():
            (content / name).write_bytes((source / name).read_bytes())


def report(source: NativeSource | PublishedSource) -> None:
    """Tells what of a checkpoint is passed over."""
    report_unknown_keys(source.directory, source.unknown_keys)
    if not isinstance(source, PublishedSource):
        return
    if source.lacks_mtp:
        notice(f"{source.directory}: config.json promises an MTP layer, but the files hold none")
    if unused := source.unused_files():
        named = ", ".join(map(printable, unused))
        notice(f"{source.directory}: files that the index does not name: {named}")
