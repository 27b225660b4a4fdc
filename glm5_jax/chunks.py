"""How the leaves of a tree are cut into chunks."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

CHUNK_BYTES = 64 * 2**20

Region = tuple[slice, ...]  # of an array; each slice has a start and a stop


class Layout(NamedTuple):
    """Shape and dtype of a leaf, and how it is cut into chunks."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    chunk: tuple[int, ...]

    @property
    def grid(self) -> tuple[int, ...]:
        """Chunks along each axis."""
        return tuple(-(-size // part) for size, part in zip(self.shape, self.chunk, strict=True))

    @property
    def chunk_bytes(self) -> int:
        """Size of a chunk."""
        return math.prod(self.chunk) * self.dtype.itemsize

    def positions(self) -> Iterator[tuple[int, ...]]:
        """Every chunk's place in the grid, the last axis fastest."""
        return itertools.product(*(range(count) for count in self.grid))

    def within(self, at: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """The chunks of one element of the leading axes, which have a chunk for each."""
        rest = (range(count) for count in self.grid[len(at) :])
        return itertools.product(*((place,) for place in at), *rest)

    def region(self, position: tuple[int, ...]) -> Region:
        """The part of the leaf that a chunk holds."""
        return tuple(
            slice(place * part, min((place + 1) * part, size))
            for place, part, size in zip(position, self.chunk, self.shape, strict=True)
        )


def overlap(held: Region, wanted: Region) -> tuple[Region, Region] | None:
    """What two regions have in common, counted from the start of each; None if nothing."""
    bounds = [
        (max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(held, wanted, strict=True)
    ]
    if any(first >= last for first, last in bounds):
        return None
    in_held, in_wanted = (
        tuple(
            slice(first - each.start, last - each.start)
            for (first, last), each in zip(bounds, region, strict=True)
        )
        for region in (held, wanted)
    )
    return in_held, in_wanted


def layout(shape: Sequence[int], dtype: jax.typing.DTypeLike, num_single_axes: int = 0) -> Layout:
    """Cuts a leaf: one element along the leading single axes, then rows up to 64 MiB."""
    held = jnp.dtype(dtype)
    chunk = [1] * num_single_axes + list(shape[num_single_axes:])
    if num_single_axes < len(shape):
        row_bytes = int(np.prod(shape[num_single_axes + 1 :], dtype=np.int64)) * held.itemsize
        rows = max(1, CHUNK_BYTES // max(1, row_bytes))
        chunk[num_single_axes] = min(chunk[num_single_axes], rows)
    return Layout(tuple(shape), held, tuple(chunk))
