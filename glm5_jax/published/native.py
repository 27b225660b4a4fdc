"""A native checkpoint seen as published tensors."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from glm5_jax.checkpoint import CONFIG_NAME, PARAMS_NAME, check_leaves
from glm5_jax.chunks import Layout
from glm5_jax.config_json import read_config
from glm5_jax.errors import InputError
from glm5_jax.model import Glm5
from glm5_jax.params import ParamSpec, leaves_by_path
from glm5_jax.published.families import by_family
from glm5_jax.published.fp8 import dequantize
from glm5_jax.published.names import published_tensors
from glm5_jax.published.slices import slices
from glm5_jax.published.source import Stored
from glm5_jax.quantization import SCALES, VALUES, Scheme, stored_scheme
from glm5_jax.quantized import unpacked
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
        self._require_rows()

    def _require_rows(self) -> None:
        """Raises `InputError` unless chunks are rows of one tensor, or all of its scales."""
        faults: dict[str, str] = {}
        for name, tensor in self._tensors.items():
            axis = len(tensor.at)
            shape, _, chunk = self.leaves[leaf := self._leaf(name)]
            if chunk != (*[1] * axis, chunk[axis], *shape[axis + 1 :]):
                faults[leaf] = f"is in chunks of {list(chunk)}, expected rows of one tensor each"
            if self.has_scales(name):
                shape, _, chunk = self.leaves[leaf := tensor.leaf + SCALES]
                if chunk != (*[1] * axis, *shape[axis:]):
                    faults[leaf] = (
                        f"is in chunks of {list(chunk)}, expected those of one tensor each"
                    )
        if faults:
            said = "; ".join(f"leaf {leaf} {fault}" for leaf, fault, _ in by_family(faults.items()))
            raise InputError(f"{self._reader.directory}: {said}")

    def tensors(self) -> dict[str, Stored]:
        """Every tensor by its published name, as it is read; scales are not tensors."""
        return {
            name: Stored(tensor.shape, self.dtype(name)) for name, tensor in self._tensors.items()
        }

    @property
    def digest(self) -> str:
        """The SHA-256 of the manifest, which has those of all weights."""
        return self._reader.digest

    @property
    def leaves(self) -> Mapping[str, Layout]:
        """How the weights lie on the disk."""
        return self._reader.leaves

    def dtype(self, name: str) -> np.dtype:
        """The dtype that a tensor is read in."""
        scaled = self.has_scales(name)
        return np.dtype(np.float32) if scaled else self._reader.leaves[self._leaf(name)].dtype

    def spec(self, name: str) -> ParamSpec:
        """The declaration of the weight that a tensor is a part of."""
        return self._specs[self._tensors[name].leaf]

    def kind(self, name: str) -> str:
        """The dtype that a tensor is kept in."""
        scheme = self.scheme(name)
        return scheme.kind if scheme else self.dtype(name).name

    def scheme(self, name: str) -> Scheme | None:
        """How a tensor is kept in few bits; None if it is not."""
        return stored_scheme(self._reader.leaves, self._tensors[name].leaf)

    def has_scales(self, name: str) -> bool:
        """Whether a tensor is kept in few bits, which `read` multiplies by their scales."""
        return self.scheme(name) is not None

    def _leaf(self, name: str) -> str:
        return self._tensors[name].leaf + (VALUES if self.has_scales(name) else "")

    def blocks(self, name: str) -> Iterator[tuple[int, int]]:
        """The portions of rows that a tensor is best read in: (start, stop)."""
        for part in slices(self._tensors[name], self._reader.leaves[self._leaf(name)]):
            yield part.start, part.stop

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of a tensor's first axis, every chunk of them verified.

        What is kept in few bits is multiplied by its scales and returned as float32.
        """
        rows, scheme = self.read_kept(name, start, stop), self.scheme(name)
        if scheme is None:
            return rows
        block = scheme.block(self._tensors[name].shape)
        return dequantize(rows, self.scales(name), start, block=block)

    def read_kept(self, name: str, start: int, stop: int) -> np.ndarray:
        """The same as it is kept."""
        tensor, scheme, leaf = self._tensors[name], self.scheme(name), self._leaf(name)
        parts = []
        for part in slices(tensor, self._reader.leaves[leaf]):
            if part.start < stop and start < part.stop:
                chunk = self._reader.read(leaf, part.position)
                if scheme and scheme.kind == "int4":
                    chunk = unpacked(chunk)
                rows = chunk.reshape(part.stop - part.start, *tensor.shape[1:])
                parts.append(rows[max(start - part.start, 0) : stop - part.start])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def scales(self, name: str) -> np.ndarray:
        """The scales of the blocks of a published matrix that is kept in few bits."""
        tensor, scheme = self._tensors[name], self.scheme(name)
        assert scheme is not None
        leaf = tensor.leaf + SCALES
        (part,) = self._reader.leaves[leaf].within(tensor.at)
        return scheme.of_published(self._reader.read(leaf, part), self._specs[tensor.leaf])

    def close(self) -> None:
        """Nothing stays open."""
