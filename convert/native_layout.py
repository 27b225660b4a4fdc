"""How the weights of a published checkpoint will lie in a native one."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from glm5_jax.checkpoint import params_layout
from glm5_jax.chunks import Layout
from glm5_jax.published.names import published_tensors
from glm5_jax.published.source import PublishedSource


def num_bytes(place: Layout) -> int:
    """Size of a leaf."""
    return math.prod(place.shape) * place.dtype.itemsize


def layout_json(place: Layout) -> list[Any]:
    """A layout in JSON."""
    return [list(place.shape), place.dtype.name, list(place.chunk)]


def native_layout(
    source: PublishedSource, float8_as: jax.typing.DTypeLike | None
) -> dict[str, Layout]:
    """Leaves keep the dtype of their tensors; float8 becomes what is asked for.

    Where some tensors of a leaf are float8 and others not, all become what holds both.
    """
    stored = source.tensors()
    dtypes: dict[str, jax.typing.DTypeLike] = {}
    with jax.numpy_dtype_promotion("standard"):  # asks for what holds both, and mixes no arrays
        for tensor in published_tensors(source.config):
            dtype: jax.typing.DTypeLike = stored[tensor.name].dtype
            if source.is_float8(tensor.name):
                dtype = float8_as or source.config.dtype
            dtypes[tensor.leaf] = jnp.promote_types(dtypes.get(tensor.leaf, dtype), dtype)
    return params_layout(source.config, dtypes)


def native_json(source: PublishedSource) -> dict[str, Any]:
    """The source's own `config.json`, but for what is no longer so."""
    raw = {key: value for key, value in source.raw_config.items() if key != "quantization_config"}
    if source.lacks_mtp:
        raw["num_nextn_predict_layers"] = 0
    return raw
