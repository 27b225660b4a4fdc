"""How the weights of a published checkpoint will lie in a native one."""

import functools
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glm5_jax.checkpoint import PARAMS_NAME, params_layout
from glm5_jax.chunks import Layout
from glm5_jax.config import Config
from glm5_jax.model import Glm5
from glm5_jax.params import leaves_by_path
from glm5_jax.published.fp8 import SCALE_SUFFIX, scale_shape
from glm5_jax.published.names import published_tensors
from glm5_jax.published.slices import Slice, slices
from glm5_jax.published.source import PublishedSource
from glm5_jax.quantization import SCALES, SCHEMES, VALUES, stored_scheme
from glm5_jax.tree_writer import is_put

FLOAT8 = SCHEMES["float8"]


def num_bytes(place: Layout) -> int:
    """Size of a leaf."""
    return math.prod(place.shape) * place.dtype.itemsize


def are_put(leaves: Mapping[str, Layout], content: Path, record: Mapping[str, Any]) -> bool:
    """Whether a conversion's content has the chunks of a record, as far as their sizes tell."""
    params = content / PARAMS_NAME
    return params.exists() or all(
        is_put(params, leaf, leaves[leaf], tuple(position))
        for leaf, position, _ in record["chunks"]
    )


def layout_json(place: Layout) -> list[Any]:
    """A layout in JSON."""
    return [list(place.shape), place.dtype.name, list(place.chunk)]


def native_layout(
    source: PublishedSource, float8_as: jax.typing.DTypeLike | None
) -> dict[str, Layout]:
    """Leaves keep the dtype of their tensors; float8 becomes what is asked for, or stays.

    Where some tensors of a leaf are float8 and others not, all become what holds the others, and
    what float8 was to become.
    """
    stored = source.tensors()
    found: dict[str, set[np.dtype]] = {}
    for tensor in published_tensors(source.config):
        dtype: jax.typing.DTypeLike = stored[tensor.name].dtype
        if source.has_scales(tensor.name):
            dtype = float8_as or source.config.dtype
        found.setdefault(tensor.leaf, set()).add(jnp.dtype(dtype))
    dtypes = {leaf: _common(several) for leaf, several in found.items()}
    leaves = params_layout(source.config, dtypes)
    for leaf, weight in leaves_by_path(Glm5(source.config)).items():
        if dtypes[leaf] == FLOAT8.kind:
            del leaves[leaf]
            leaves |= FLOAT8.layouts(leaf, weight)
    return leaves


def _common(dtypes: set[np.dtype]) -> np.dtype:
    """What holds all of them. Float8 needs scales, which a leaf has for all of it or not at all."""
    several = sorted(dtypes - {FLOAT8.held_as} or dtypes, key=str)
    with jax.numpy_dtype_promotion("standard"):  # asks for what holds both, and mixes no arrays
        return functools.reduce(jnp.promote_types, several)


class Place(NamedTuple):
    """Where a published tensor goes."""

    leaf: str
    dtype: np.dtype
    slices: list[Slice]
    spread: Callable[[np.ndarray], np.ndarray] | None = None  # of scales, for the blocks of a leaf


def places(config: Config, leaves: Mapping[str, Layout]) -> dict[str, Place]:
    """Where every published tensor goes, scales too if they are kept."""
    found = {}
    weights = leaves_by_path(Glm5(config))
    for tensor in published_tensors(config):
        scheme = stored_scheme(leaves, tensor.leaf)
        leaf = tensor.leaf + VALUES if scheme else tensor.leaf
        found[tensor.name] = Place(leaf, leaves[leaf].dtype, list(slices(tensor, leaves[leaf])))
        if scheme:
            leaf, weight = tensor.leaf + SCALES, weights[tensor.leaf]
            (position,) = leaves[leaf].within(tensor.at)
            rows = scale_shape(tensor.shape)[0]
            whole = Slice(0, rows, position, leaves[leaf].chunk)
            found[tensor.name + SCALE_SUFFIX] = Place(
                leaf, leaves[leaf].dtype, [whole], functools.partial(scheme.of_leaf, weight=weight)
            )
    return found


def native_json(source: PublishedSource, leaves: Collection[str]) -> dict[str, Any]:
    """The source's own `config.json`, but for what is no longer so."""
    raw = dict(source.raw_config)
    if not any(leaf.endswith(VALUES) for leaf in leaves):
        raw.pop("quantization_config", None)
    if source.lacks_mtp:
        raw["num_nextn_predict_layers"] = 0
    return raw
