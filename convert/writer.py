"""The files of a published checkpoint: which tensors they hold, and what they start with."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from glm5_jax.published.files import INDEX_NAME, SINGLE_NAME
from glm5_jax.published.tensor_file import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def file_header(entries: list[Entry]) -> bytes:
    """What a safetensors file starts with; its tensors follow, one directly after the other."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        offsets = [end, end := end + entry.num_bytes]
        header[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": offsets,
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts aligned
    return len(text).to_bytes(8, "little") + text


def split_shards(entries: list[Entry], shard_bytes: int) -> list[list[Entry]]:
    """Cuts tensors into files of at most `shard_bytes`, unless one tensor is larger than that."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.num_bytes
    return shards


def shard_names(count: int) -> Iterator[str]:
    """The names of the files of a checkpoint."""
    if count == 1:
        yield SINGLE_NAME
        return
    for number in range(1, count + 1):
        yield f"model-{number:05d}-of-{count:05d}.safetensors"


def write_index(directory: Path, shards: Mapping[str, list[Entry]]) -> None:
    """Writes the index of a checkpoint of several files, by their names."""
    weight_map = {entry.name: file for file, shard in shards.items() for entry in shard}
    total = sum(entry.num_bytes for shard in shards.values() for entry in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
