"""Native checkpoints: a directory with `config.json`, tokenizer files and the weights' tree."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from glm5_jax import quantization
from glm5_jax.atomic import new_directory
from glm5_jax.chunks import Layout, layout
from glm5_jax.config import Config
from glm5_jax.config_json import config_to_json, read_config
from glm5_jax.errors import InputError
from glm5_jax.model import Glm5
from glm5_jax.params import ParamSpec, leaf_dtype, leaves_by_path, map_specs
from glm5_jax.processes import on_first
from glm5_jax.published.families import by_family
from glm5_jax.published.names import num_stacked_axes
from glm5_jax.quantization import SCHEMES, VALUES, stored_scheme
from glm5_jax.quantized import Quantized, is_quantized
from glm5_jax.remote import AnyPath
from glm5_jax.sharding import Partition, keeping
from glm5_jax.tree_store import TreeReader
from glm5_jax.tree_writer import write_tree

CONFIG_NAME = "config.json"
PARAMS_NAME = "params"
_DTYPES = ("float32", "bfloat16", "float16")  # of weights
# Files that say how to use a model and travel with it.
TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def is_native(directory: AnyPath) -> bool:
    """Whether a directory holds a native checkpoint."""
    return (directory / PARAMS_NAME).is_dir()


def scheme_of(directory: Path) -> str | None:
    """The name of the scheme by which a checkpoint has weights in few bits; None if it has none.

    Raises:
      InputError: it is damaged.
    """
    if not is_native(directory):
        return None
    leaves = TreeReader(directory / PARAMS_NAME).leaves
    found = {stored_scheme(leaves, leaf.removesuffix(VALUES)) for leaf in leaves}
    return next((name for name, scheme in SCHEMES.items() if scheme in found), None)


def params_layout(
    config: Config, dtype_of: Mapping[str, jax.typing.DTypeLike]
) -> dict[str, Layout]:
    """How each leaf of a model is stored: every published tensor is a chunk, or several."""
    return {
        leaf: layout(spec.shape, dtype_of[leaf], num_stacked_axes(spec))
        for leaf, spec in leaves_by_path(Glm5(config)).items()
    }


def write_text_files(
    directory: Path, config_json: Mapping[str, Any], text_from: AnyPath | None
) -> None:
    """Writes `config.json` and copies the tokenizer files there are."""
    (directory / CONFIG_NAME).write_text(json.dumps(config_json, indent=2) + "\n")
    for name in TEXT_FILES:
        if text_from is not None and (text_from / name).exists():
            if not (text_from / name).is_file():
                raise InputError(f"{text_from / name}: not a file")
            (directory / name).write_bytes((text_from / name).read_bytes())


def save_checkpoint(destination: Path, model: Glm5, text_from: Path | None = None) -> None:
    """Saves a model as a native checkpoint.

    Raises:
      InputError: `destination` exists.
    """
    with on_first(lambda: new_directory(destination)) as directory:
        write_model(directory, model, text_from)


def write_model(directory: Path | None, model: Glm5, text_from: Path | None = None) -> None:
    """Writes a model into a directory, which is a native checkpoint then.

    Args:
      directory: None in all processes but the first, as in `write_tree`.

    Raises:
      ValueError: some weights are in few bits.
    """
    if any(map(is_quantized, jax.tree.leaves(model, is_leaf=is_quantized))):
        raise ValueError("weights in few bits are not saved: `glm5-convert quantize` makes them")
    arrays = leaves_by_path(model)
    leaves = params_layout(model.config, {leaf: array.dtype for leaf, array in arrays.items()})
    if directory is not None:
        write_text_files(directory, config_to_json(model.config), text_from)
    params = None if directory is None else directory / PARAMS_NAME
    write_tree(params, arrays, leaves, beside=[CONFIG_NAME])


def restore_checkpoint(
    directory: Path,
    dtype: jax.typing.DTypeLike | None = None,
    partition: Partition | None = None,
) -> Glm5:
    """Restores a native checkpoint, every chunk of it verified.

    A process reads the chunks that its devices need, whatever mesh the checkpoint was saved from.

    Args:
      dtype: to convert the weights to, but for pinned ones; as they are stored unless given.
      partition: the devices that keep the weights; the first one unless given.

    Raises:
      InputError: the checkpoint is incomplete or damaged, or not one of its config.
    """
    config = read_config(directory / CONFIG_NAME).config
    blueprint = Glm5(config)
    reader = TreeReader(directory / PARAMS_NAME)
    check_leaves(reader, leaves_by_path(blueprint))
    sharding = keeping(partition)

    def restore(leaf: str, spec: ParamSpec) -> jax.Array | Quantized:
        if stored_scheme(reader.leaves, leaf):
            return quantization.restore(reader, leaf, spec, dtype or config.dtype, partition)
        stored = reader.restore(leaf, sharding(spec))
        return stored.astype(leaf_dtype(spec, dtype or stored.dtype))

    return map_specs(restore, blueprint)


def check_leaves(reader: TreeReader, specs: Mapping[str, ParamSpec]) -> None:
    """Compares what a tree holds with what a blueprint declares; all differences are named."""
    expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}  # shapes and dtypes
    for leaf, spec in specs.items():
        scheme = stored_scheme(reader.leaves, leaf)
        if scheme is None:
            expected[leaf] = spec.shape, _DTYPES
        else:
            stored = scheme.layouts(leaf, spec)
            expected |= {name: (place.shape, (place.dtype.name,)) for name, place in stored.items()}
    faults = [(leaf, "is missing") for leaf in expected if leaf not in reader.leaves]
    faults += [(leaf, "is unknown") for leaf in reader.leaves if leaf not in expected]
    for leaf, place in reader.leaves.items():
        shape, dtypes = expected.get(leaf, (place.shape, (place.dtype.name,)))
        if place.shape != shape:
            faults.append((leaf, f"has shape {list(place.shape)!s:.80}, expected {list(shape)}"))
        if place.dtype.name not in dtypes:
            faults.append((leaf, f"has dtype {place.dtype}, expected {' or '.join(dtypes)}"))
    if faults:
        said = "; ".join(f"leaf {subject} {fault}" for subject, fault, _ in by_family(faults))
        raise InputError(f"{reader.directory}: {said}")
