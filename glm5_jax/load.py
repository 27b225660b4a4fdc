"""Loading a model from a directory, native or published."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from glm5_jax.checkpoint import CONFIG_NAME, is_native, restore_checkpoint
from glm5_jax.config_json import PublishedConfig, read_config
from glm5_jax.errors import InputError
from glm5_jax.model import Glm5
from glm5_jax.params import ParamSpec, leaf_dtype, map_specs
from glm5_jax.processes import is_first
from glm5_jax.published.names import PublishedTensor, published_tensors
from glm5_jax.published.source import PublishedSource
from glm5_jax.sharding import Partition, from_parts, keeping


def read_model_config(directory: Path) -> PublishedConfig:
    """Reads the config of a checkpoint directory, native or published.

    Raises:
      InputError: there is no such directory, or its config is missing or not supported.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: is not a directory, expected one with a checkpoint")
    if not (directory / CONFIG_NAME).exists():
        inner = sorted(path.parent for path in directory.glob(f"*/{CONFIG_NAME}"))
        hint = f", such as {inner[-1]}" if inner else ""
        raise InputError(f"{directory}: has no {CONFIG_NAME}, expected a checkpoint{hint}")
    return read_config(directory / CONFIG_NAME)


def dtype_to_run(stored: str, asked: str | None = None) -> str:
    """The dtype to run a model in, which the process is made ready for.

    Accelerators would multiply float32 with fewer bits, and float16, in which few models are
    stored, has too small a range.

    Args:
      stored: that of the checkpoint's config.
      asked: by the user.
    """
    dtype = asked or ("float32" if stored == "float16" else stored)
    if dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")
    return dtype


def load_model(
    directory: Path,
    dtype: jax.typing.DTypeLike | None = None,
    partition: Partition | None = None,
) -> Glm5:
    """Loads a model's weights; a process reads only what its devices keep.

    Args:
      directory: a native checkpoint, or a directory in the published layout.
      dtype: to convert the weights to, but for pinned ones; unless given the config's of a
        published checkpoint, and that which they are stored in of a native one.
      partition: the devices that keep the weights; the first one unless given.

    Raises:
      InputError: the directory is not a whole, sound checkpoint.
    """
    read_model_config(directory)
    if is_native(directory):
        return restore_checkpoint(directory, dtype, partition)
    return _load_published(directory, dtype, keeping(partition))


def _load_published(
    directory: Path,
    dtype: jax.typing.DTypeLike | None,
    sharding: Callable[[ParamSpec], jax.sharding.Sharding],
) -> Glm5:
    source = PublishedSource(directory)
    try:
        by_leaf: dict[str, list[PublishedTensor]] = {}
        for tensor in published_tensors(source.config):
            by_leaf.setdefault(tensor.leaf, []).append(tensor)

        def fill(leaf: str, spec: ParamSpec) -> jax.Array:
            held = leaf_dtype(spec, dtype or source.config.dtype)

            def read(wanted: tuple[slice, ...]) -> np.ndarray:
                part = np.empty([each.stop - each.start for each in wanted], held)
                for tensor in by_leaf[leaf]:
                    _read_tensor(source, tensor, spec.shape, wanted, part)
                return part

            return from_parts(spec.shape, sharding(spec), read)

        if is_first():  # the only part that is read whole
            source.check_copies()
        return map_specs(fill, Glm5(source.config))
    finally:
        source.close()


def _read_tensor(
    source: PublishedSource,
    tensor: PublishedTensor,
    shape: tuple[int, ...],
    wanted: tuple[slice, ...],
    part: np.ndarray,
) -> None:
    """Copies what a tensor holds of a part of its leaf; reads only the rows that are wanted."""
    stacked = len(tensor.at)
    at = tuple(place - each.start for place, each in zip(tensor.at, wanted, strict=False))
    if any(not 0 <= place < size for place, size in zip(at, part.shape, strict=False)):
        return
    first, *others = wanted[stacked:]
    # The tensor's rows are the leaf's first axis, or this and further ones together.
    rows = tensor.shape[0] // shape[stacked]
    read = source.read(tensor.name, first.start * rows, first.stop * rows)
    read = read.reshape(first.stop - first.start, *shape[stacked + 1 :])
    part[at] = read[(slice(None), *others)]
