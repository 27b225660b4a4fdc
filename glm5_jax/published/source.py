"""A published checkpoint directory, read tensor by tensor."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from glm5_jax.chunks import layout
from glm5_jax.config import Config
from glm5_jax.config_json import read_config
from glm5_jax.errors import InputError
from glm5_jax.published.check import tensor_problems
from glm5_jax.published.exports import as_published
from glm5_jax.published.families import by_family
from glm5_jax.published.files import open_files
from glm5_jax.published.fp8 import BLOCK, SCALE_SUFFIX, dequantize
from glm5_jax.published.names import MTP_COPIES, layer_prefix
from glm5_jax.published.storage import Opener, open_storage
from glm5_jax.published.subset import WHOLE, Subset, ranges, subset_config, subset_tensors
from glm5_jax.published.tensor_file import DTYPES, FLOAT8, TensorFile
from glm5_jax.remote import AnyPath


class Stored(NamedTuple):
    """Shape and dtype of a tensor as it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype


def _first_fault(scales: np.ndarray) -> str | None:
    wrong = np.argwhere(~(np.isfinite(scales) & (scales >= 0)))
    if not wrong.size:
        return None
    i, j = (int(place) for place in wrong[0])
    return f"is {scales[i, j]} at [{i}, {j}], expected finite scales that are not negative"


class PublishedSource:
    """An open published checkpoint."""

    def __init__(self, directory: AnyPath, subset: Subset = WHOLE, opener: Opener = open_storage):
        """Opens a directory: reads `config.json` and the headers of the tensor files.

        Args:
          subset: the part of it that is seen, as if it were all; files without any are not read.

        Raises:
          InputError: a file is missing or damaged, or the tensors are not those that the config
            demands; then all differences are named. Or there is no such subset.
        """
        whole = read_config(directory / "config.json")
        published = subset_config(directory, whole, subset)
        self.directory = directory
        self.subset = subset
        self.config = published.config
        self.raw_config = published.raw
        self.unknown_keys = published.unknown_keys
        self._files: dict[str, TensorFile] = {}
        self._opened = open_files(directory, subset.wants, opener)
        try:
            self._show_as_published(whole.config)
            self._check()
        except BaseException:
            self.close()
            raise

    def _show_as_published(self, config: Config) -> None:
        """Has files show what is seen of them; the config is that of the whole checkpoint."""
        headers = {file.path.name: file.tensors for file in self._opened}
        headers = as_published(self.directory, headers, config)
        for file in self._opened:
            file.tensors = subset_tensors(headers[file.path.name], config, self.subset)
            self._files |= dict.fromkeys(file.tensors, file)

    def _check(self) -> None:
        mtp_prefix = layer_prefix(self.config.num_layers)
        # transformers keeps the config's MTP layer and drops its tensors when it saves a model.
        self.lacks_mtp = self.config.num_mtp_layers > 0 and not any(
            name.startswith(mtp_prefix) for name in self._files
        )
        if self.lacks_mtp:
            self.config = dataclasses.replace(self.config, num_mtp_layers=0)
        self.copies = {
            mtp_prefix + name: original
            for name, original in MTP_COPIES.items()
            if mtp_prefix + name in self._files
        }
        infos = {name: file.tensors[name] for name, file in self._files.items()}
        if problems := tensor_problems(self.config, infos, self.copies):
            layers = self.subset.layers
            seen = "" if layers is None else f", its layers {ranges(layers)} renumbered"
            raise InputError(f"{self.directory}{seen}: {'; '.join(problems)}")

    def tensors(self) -> dict[str, Stored]:
        """Every tensor by its published name, as it is read; scales are not tensors."""
        return {
            name: Stored(file.tensors[name].shape, self.dtype(name))
            for name, file in self._files.items()
            if not name.endswith(SCALE_SUFFIX)
        }

    def needed_elsewhere(self) -> set[str]:
        """What the weights of another file may need: scales, which need not lie beside them."""
        return {name for name in self._files if name.endswith(SCALE_SUFFIX)}

    def unused_files(self) -> list[str]:
        """Tensor files of the directory that the index does not name; not known of a subset."""
        if self.subset != WHOLE:
            return []
        used = {file.path.name for file in self.files()}
        found = {path.name for path in self.directory.glob("*.safetensors")}
        return sorted(found - used)

    def kind(self, name: str) -> str:
        """The dtype that a tensor is kept in."""
        return DTYPES[self._files[name].tensors[name].dtype].name

    def has_scales(self, name: str) -> bool:
        """Whether a tensor is float8, which `read` multiplies by its scales."""
        return self._files[name].tensors[name].dtype == FLOAT8

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of a tensor's first axis.

        Float8 is multiplied by its scales and returned as float32.

        Raises:
          InputError: the file ends too soon, or a scale is negative or not finite.
        """
        return self.decode(name, self._files[name].read(name, start, stop), start)

    def decode(
        self, name: str, rows: np.ndarray, start: int, float8_as: jax.typing.DTypeLike = np.float32
    ) -> np.ndarray:
        """Rows as `read` returns them, from what the file holds of them.

        Args:
          float8_as: the dtype that float8 weights are multiplied out to.

        Raises:
          InputError: a scale is negative or not finite.
        """
        if not self.has_scales(name):
            return rows
        scales = self._scales(name)
        if fault := _first_fault(scales):
            raise InputError(f"{self._files[name].path}: {name}{SCALE_SUFFIX} {fault}")
        return dequantize(rows, scales, start, float8_as)

    def _scales(self, name: str) -> np.ndarray:
        scale_name = name + SCALE_SUFFIX
        file = self._files[scale_name]
        return file.read(scale_name, 0, file.tensors[scale_name].shape[0])

    def check_scales(self) -> None:
        """Reads the scales of all float8 tensors.

        Raises:
          InputError: some are negative or not finite, or zero where a weight is not; all tensors
            that have such are named.
        """
        faults = []
        for name in self._files:
            if name.endswith(SCALE_SUFFIX) or not self.has_scales(name):
                continue
            scales = self._scales(name)
            if fault := _first_fault(scales) or self._zeroed(name, scales):
                faults.append((name + SCALE_SUFFIX, fault))
        if faults:
            said = "; ".join(f"{subject} {fault}" for subject, fault, _ in by_family(faults))
            raise InputError(f"{self.directory}: {said}")

    def _zeroed(self, name: str, scales: np.ndarray) -> str | None:
        """Where a scale of zero erases weights; quantizers give it to blocks of zeros, too."""
        file = self._files[name]
        for i in np.flatnonzero((scales == 0).any(axis=1)).tolist():
            last = min((i + 1) * BLOCK, file.tensors[name].shape[0])
            rows = file.read(name, i * BLOCK, last).view(np.uint8) & 0x7F  # without the sign
            for j in np.flatnonzero(scales[i] == 0).tolist():
                if rows[:, j * BLOCK : (j + 1) * BLOCK].any():
                    return f"is 0.0 at [{i}, {j}], where weights are not 0"
        return None

    def check_copies(self) -> None:
        """Reads the copies of embedding and head that the MTP layer may carry, which are not kept.

        Raises:
          InputError: one is not a copy.
        """
        for name, original in self.copies.items():
            for start, stop in self.blocks(original):
                parts = (self.read(tensor, start, stop) for tensor in (name, original))
                if len({part.tobytes() for part in parts}) > 1:
                    raise InputError(
                        f"{self.directory}: {name} differs from {original}, expected a copy of it"
                    )

    def blocks(self, name: str) -> Iterator[tuple[int, int]]:
        """The portions of rows that a tensor is best read in: (start, stop)."""
        place = layout(self._files[name].tensors[name].shape, self.dtype(name))
        for position in place.positions():
            rows = place.region(position)[0]
            yield rows.start, rows.stop

    def files(self) -> list[TensorFile]:
        """The open files that hold tensors, by name."""
        return sorted(set(self._files.values()), key=lambda file: file.path.name)

    def num_bytes(self, file: TensorFile) -> int:
        """How much of a file is read; of a subset, its tensors alone."""
        if self.subset == WHOLE:
            return file.version.size
        return sum(info.num_bytes for info in file.tensors.values())

    def close(self) -> None:
        """Closes the files."""
        for file in self._opened:
            file.close()

    def dtype(self, name: str) -> np.dtype:
        """The dtype that a tensor is read in."""
        file_dtype = self._files[name].tensors[name].dtype
        return np.dtype(np.float32) if self.has_scales(name) else DTYPES[file_dtype]
