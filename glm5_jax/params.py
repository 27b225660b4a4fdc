"""Weights declared once: shape, logical axes and initial values, before any array exists.

A model class built from a config is a *blueprint*: a pytree with a `ParamSpec` at every leaf.
`initialize` turns it into the same tree of arrays. The path of a leaf is its name in native
checkpoints and in the table of published names.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import nnx

Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One weight: its shape, a name for each axis, and how it starts."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    start: Literal["normal", "ones", "zeros"]
    # float32 where rounding the weight would change what the model does; else the model's dtype.
    pinned_dtype: str | None = None

    @property
    def size(self) -> int:
        """Number of parameters."""
        return math.prod(self.shape)


nnx.register_data_type(ParamSpec)  # lets a module that holds specs be a pytree of specs


def _declare(
    axes: str,
    shape: tuple[int, ...],
    start: Literal["normal", "ones", "zeros"],
    pinned_dtype: str | None = None,
) -> jax.Array:
    names = tuple(axes.split())
    if len(names) != len(shape):
        raise ValueError(f"{len(names)} axis names {names} for shape {shape}")
    # Declared as the array it will be, so that the code that computes with it type-checks.
    return cast(jax.Array, ParamSpec(shape, names, start, pinned_dtype))


def weight(axes: str, *shape: int) -> jax.Array:
    """Declares a matrix, drawn from a normal distribution. The output axis comes first.

    That is the order of the published tensors, so that converting moves bytes and never
    transposes, and both operands of a product are contracted along contiguous memory.
    """
    return _declare(axes, shape, "normal")


def scale(axis: str, size: int) -> jax.Array:
    """Declares the scale of a norm, starting at one."""
    return _declare(axis, (size,), "ones")


def bias(axis: str, size: int, *, pinned_dtype: str | None = None) -> jax.Array:
    """Declares a bias, starting at zero."""
    return _declare(axis, (size,), "zeros", pinned_dtype)


def is_spec(node: Any) -> bool:
    """Whether a node of a tree is a leaf of a blueprint."""
    return isinstance(node, ParamSpec)


def map_specs(function: Callable[[str, ParamSpec], Any], blueprint: Tree) -> Tree:
    """The same tree with `function(path, spec)` at every leaf."""
    return cast(
        Tree,
        jax.tree_util.tree_map_with_path(
            lambda keys, spec: function(leaf_path(keys), spec), blueprint, is_leaf=is_spec
        ),
    )


def stacked(blueprint: Tree, count: int) -> Tree:
    """The blueprint of `count` equal modules, stacked along a new first axis, `layers`."""
    return map_specs(
        lambda _, spec: dataclasses.replace(
            spec, shape=(count, *spec.shape), axes=("layers", *spec.axes)
        ),
        blueprint,
    )


def leaf_path(keys: tuple[Any, ...]) -> str:
    """A leaf's name from its key path: `segments.1.layers.0.attention.q_down`."""
    return jax.tree_util.keystr(keys, simple=True, separator=".")


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree of specs or arrays, by their path."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_spec)
    return {leaf_path(keys): leaf for keys, leaf in flat}


def count_params(blueprint: Any) -> int:
    """Number of parameters of a blueprint."""
    return sum(spec.size for spec in leaves_by_path(blueprint).values())


def leaf_dtype(spec: ParamSpec, dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype a weight is held in by a model of the given dtype."""
    return jnp.dtype(spec.pinned_dtype or dtype)


def initialize(
    blueprint: Tree, key: jax.Array, *, std: float, dtype: jax.typing.DTypeLike = jnp.float32
) -> Tree:
    """Draws initial weights.

    Args:
      key: folded with each leaf's path, so that a leaf's values do not depend on the others.
      std: of the normal distribution that matrices are drawn from.
      dtype: of all weights but those pinned to another.
    """

    def draw(path: str, spec: ParamSpec) -> jax.Array:
        held = leaf_dtype(spec, dtype)
        if spec.start == "ones":
            return jnp.ones(spec.shape, held)
        if spec.start == "zeros":
            return jnp.zeros(spec.shape, held)
        leaf_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        return (std * jax.random.normal(leaf_key, spec.shape)).astype(held)

    return map_specs(draw, blueprint)


def abstract(
    blueprint: Tree,
    dtype: jax.typing.DTypeLike = jnp.float32,
    sharding: Callable[[ParamSpec], jax.sharding.Sharding | None] = lambda _: None,
) -> Tree:
    """The shapes and dtypes of the weights, for tracing without memory.

    Args:
      sharding: how a weight lies on devices, for compiling for a mesh.
    """
    return map_specs(
        lambda _, spec: jax.ShapeDtypeStruct(
            spec.shape, leaf_dtype(spec, dtype), sharding=sharding(spec)
        ),
        blueprint,
    )
