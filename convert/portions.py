"""In which portions a shard is read, and which chunk each becomes."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from convert.native_layout import Place
from glm5_jax.chunks import CHUNK_BYTES
from glm5_jax.published.slices import Slice
from glm5_jax.published.tensor_file import TensorFile


class Portion(NamedTuple):
    """Bytes of a shard that lie together, and the chunk that they become, if they do."""

    offset: int
    size: int
    chunk: tuple[str, Slice] | None = None  # of which tensor, and where
    again: int = 0  # of its first bytes, those that a portion before it has, too


def portions(file: TensorFile, places: Mapping[str, Place], *, whole: bool) -> Iterator[Portion]:
    """The portions of a file in the order of its bytes, of which tensors may share some.

    Args:
      places: where tensors go, by their names.
      whole: read what is before, between and after tensors as well.
    """
    end = 0
    for portion in sorted(_of_tensors(file, places), key=lambda each: each.offset):
        if whole:
            yield from _between(end, portion.offset)
        yield portion._replace(again=min(max(end - portion.offset, 0), portion.size))
        end = max(end, portion.offset + portion.size)
    if whole:
        yield from _between(end, file.version.size)


def _of_tensors(file: TensorFile, places: Mapping[str, Place]) -> Iterator[Portion]:
    for name, info in file.tensors.items():
        place = places.get(name)
        if place is None:  # a scale that is not kept, or a copy of another tensor
            yield from _between(info.start, info.start + info.num_bytes)
            continue
        for part in place.slices:
            yield Portion(*file.span(name, part.start, part.stop), (name, part))


def _between(start: int, stop: int) -> Iterator[Portion]:
    """Portions that become nothing."""
    for offset in range(start, stop, CHUNK_BYTES):
        yield Portion(offset, min(CHUNK_BYTES, stop - offset))
