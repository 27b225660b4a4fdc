"""A native checkpoint seen as published tensors."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from glm5_jax.checkpoint import CONFIG_NAME, PARAMS_NAME, check_leaves
from glm5_jax.config_json import read_config
from glm5_jax.model import Glm5
from glm5_jax.params import ParamSpec, leaves_by_path
from glm5_jax.published.names import published_tensors
from glm5_jax.published.slices import slices
from glm5_jax.published.source import Stored
from glm5_jax.tree_store import TreeReader


class NativeSource:
    """An open native checkpoint; reads the same way as a `PublishedSource`."""

    def __init__(self, directory: Path):
        """Opens a checkpoint and checks its manifest against its config.

        Raises:
          InputError: it is incomplete or damaged.
        """
        published = read_config(directory / CONFIG_NAME)
        self.directory = directory
        self.config = published.config
        self.raw_config = published.raw
        self.unknown_keys = published.unknown_keys
        self._reader = TreeReader(directory / PARAMS_NAME)
        self._specs = leaves_by_path(Glm5(self.config))
        check_leaves(self._reader, self._specs)
        self._tensors = {tensor.name: tensor for tensor in published_tensors(self.config)}

    def tensors(self) -> dict[str, Stored]:
        """Every tensor by its published name."""
        return {
            name: Stored(tensor.shape, self._reader.leaves[tensor.leaf].dtype)
            for name, tensor in self._tensors.items()
        }

    def spec(self, name: str) -> ParamSpec:
        """The declaration of the weight that a tensor is a part of."""
        return self._specs[self._tensors[name].leaf]

    def is_float8(self, name: str) -> bool:
        """Whether a tensor is float8 with scales: none is."""
        return False

    def blocks(self, name: str) -> Iterator[tuple[int, int]]:
        """The portions of rows that a tensor is best read in: (start, stop)."""
        tensor = self._tensors[name]
        for part in slices(tensor, self._reader.leaves[tensor.leaf]):
            yield part.start, part.stop

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of a tensor's first axis, every chunk of them verified."""
        tensor = self._tensors[name]
        parts = []
        for part in slices(tensor, self._reader.leaves[tensor.leaf]):
            if part.start < stop and start < part.stop:
                chunk = self._reader.read(tensor.leaf, part.position)
                rows = chunk.reshape(part.stop - part.start, *tensor.shape[1:])
                parts.append(rows[max(start - part.start, 0) : stop - part.start])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def close(self) -> None:
        """Nothing stays open."""
