"""Which weights are kept in few bits, by what scheme, and how they lie in a native checkpoint.

A weight `NAME` that is kept so is two leaves of a checkpoint's tree: `NAME.values` and
`NAME.scales`. Blocks are those of the published matrix; a leaf whose axes are parts of the matrix's
has blocks that divide them, each with the scale of the published one that it lies in.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glm5_jax.chunks import Layout, Region, layout
from glm5_jax.errors import InputError
from glm5_jax.params import ParamSpec, map_specs
from glm5_jax.published.fp8 import BLOCK
from glm5_jax.published.names import axes_of_published, num_stacked_axes, published_shape
from glm5_jax.quantized import Quantized, repeated
from glm5_jax.sharding import Partition, from_parts, keeping
from glm5_jax.tree_store import TreeReader

VALUES, SCALES = ".values", ".scales"  # ends of leaves
# What is left as it is: little of the model, and sensitive; so do the published checkpoints.
LEFT_ALONE = ("embedding", "head", "join", "router.weight", "head_gate")


class Scheme(NamedTuple):
    """A way to keep a matrix in few bits."""

    kind: str  # of the values: a dtype's name
    rows: int | None  # of a block of one scale; None for all
    columns: int | None
    experts_only: bool = False

    @property
    def held_as(self) -> jnp.dtype:
        """The dtype of the array of values, where those of 4 bits are in pairs of rows."""
        return jnp.dtype("uint8" if self.kind == "int4" else self.kind)

    def keeps(self, leaf: str, weight: ParamSpec) -> bool:
        """Whether a weight is kept so."""
        if len(axes_of_published(weight)) != 2 or leaf.endswith(LEFT_ALONE):
            return False
        if self.experts_only and ".experts." not in f".{leaf}.":
            return False
        return self.kind != "int4" or weight.shape[-2] % 2 == 0

    def values_shape(self, weight: ParamSpec) -> tuple[int, ...]:
        """The shape of the array of a weight's values."""
        *others, rows, columns = weight.shape
        return (*others, rows // 2 if self.kind == "int4" else rows, columns)

    def block(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of a published matrix that share a scale."""
        return self.rows or shape[0], self.columns or shape[1]

    def scale_counts(self, weight: ParamSpec) -> tuple[int, ...]:
        """How many scales there are along every axis of a leaf."""
        counts = list(weight.shape[: num_stacked_axes(weight)])
        for block, axes in zip((self.rows, self.columns), axes_of_published(weight), strict=True):
            *outer, inner = (weight.shape[axis] for axis in axes)
            counts += outer if block else [1] * len(outer)
            counts.append(inner // math.gcd(block, inner) if block else 1)
        return tuple(counts)

    def layouts(self, leaf: str, weight: ParamSpec) -> dict[str, Layout]:
        """The leaves of a tree that a weight is stored in."""
        stacked = num_stacked_axes(weight)
        values = layout(self.values_shape(weight), self.held_as, stacked)
        scales = layout(self.scale_counts(weight), "float32", stacked)
        return {leaf + VALUES: values, leaf + SCALES: scales}

    def of_leaf(self, scales: np.ndarray, weight: ParamSpec) -> np.ndarray:
        """Scales of a published matrix, one for each of its blocks, as those of a leaf's."""
        shape, counts = published_shape(weight), self.scale_counts(weight)
        for axis, group in enumerate(axes_of_published(weight)):
            count = math.prod(counts[each] for each in group)
            first = np.arange(count) * (shape[axis] // count)  # row or column of each block
            scales = np.take(scales, first // self.block(shape)[axis], axis)
        return scales.reshape(counts[num_stacked_axes(weight) :])

    def of_published(self, scales: np.ndarray, weight: ParamSpec) -> np.ndarray:
        """Undoes `of_leaf`."""
        shape, counts = published_shape(weight), self.scale_counts(weight)
        groups = axes_of_published(weight)
        merged = [math.prod(counts[each] for each in group) for group in groups]
        scales = scales.reshape(merged)
        for axis, (size, block) in enumerate(zip(shape, self.block(shape), strict=True)):
            first = np.arange(0, size, block)  # row or column of each published block
            scales = np.take(scales, first // (size // merged[axis]), axis)
        return scales


# Blocks of float8 are the published ones: DeepSeek-V3, arXiv:2412.19437, section 3.3.2.
SCHEMES = {
    "float8": Scheme("float8_e4m3fn", BLOCK, BLOCK),
    "int8": Scheme("int8", 1, None),
    "int4": Scheme("int4", 1, 128, experts_only=True),
}


def stored_scheme(leaves: Mapping[str, Layout], leaf: str) -> Scheme | None:
    """The scheme by which a tree holds a weight; None if it is an array like any other."""
    values = leaves.get(leaf + VALUES)
    if values is None or leaf + SCALES not in leaves:
        return None
    return next((each for each in SCHEMES.values() if each.held_as == values.dtype), None)


def restore(
    reader: TreeReader,
    leaf: str,
    weight: ParamSpec,
    dtype: jax.typing.DTypeLike,
    partition: Partition | None,
) -> Quantized:
    """Restores a weight that is kept in few bits; a process reads what its devices need.

    Raises:
      InputError: a chunk is missing or not what was written, or devices cannot share the values.
    """
    scheme = stored_scheme(reader.leaves, leaf)
    assert scheme is not None
    sharding = keeping(partition)(weight)
    counts = reader.leaves[leaf + SCALES].shape
    times = (1,) * len(counts)
    if partition is not None:
        _require_shares(scheme, leaf, weight, partition)
        times = partition.times_of_scales(weight, counts)

    def read_scales(wanted: Region) -> np.ndarray:
        stored = tuple(
            slice(part.start // n, -(-part.stop // n))
            for part, n in zip(wanted, times, strict=True)
        )
        scales = repeated(reader.read_region(leaf + SCALES, stored), times)
        return scales[
            tuple(
                slice(part.start - n * held.start, part.stop - n * held.start)
                for part, held, n in zip(wanted, stored, times, strict=True)
            )
        ]

    refined = tuple(n * count for n, count in zip(times, counts, strict=True))
    return Quantized(
        reader.restore(leaf + VALUES, sharding),
        from_parts(refined, sharding, read_scales),
        scheme.kind,
        jnp.dtype(dtype).name,
    )


def _require_shares(scheme: Scheme, leaf: str, weight: ParamSpec, partition: Partition) -> None:
    """Raises `InputError` if devices would cut pairs of rows apart."""
    shape = scheme.values_shape(weight)
    for size, axes in zip(shape, partition.rules.divisors(weight), strict=True):
        shards = partition.num_shards(axes)
        if size % shards:
            raise InputError(
                f"leaf {leaf} has {size} pairs of rows of {scheme.kind}, which {shards} devices do "
                f"not share evenly: expected another mesh, whose {'*'.join(axes)} divides {size}"
            )


def abstract(
    blueprint: Any, scheme: Scheme, dtype: jax.typing.DTypeLike, partition: Partition
) -> Any:
    """`params.abstract` of a model whose weights are kept by a scheme.

    Raises:
      InputError: devices cannot share the values.
    """

    def keep(leaf: str, weight: ParamSpec) -> Any:
        sharding = partition.sharding(weight)
        if not scheme.keeps(leaf, weight):
            held = weight.pinned_dtype or dtype
            return jax.ShapeDtypeStruct(weight.shape, jnp.dtype(held), sharding=sharding)
        _require_shares(scheme, leaf, weight, partition)
        counts = scheme.scale_counts(weight)
        times = partition.times_of_scales(weight, counts)
        counts = tuple(n * count for n, count in zip(times, counts, strict=True))
        values: Any = jax.ShapeDtypeStruct(
            scheme.values_shape(weight), scheme.held_as, sharding=sharding
        )
        scales: Any = jax.ShapeDtypeStruct(counts, jnp.dtype(jnp.float32), sharding=sharding)
        return Quantized(values, scales, scheme.kind, jnp.dtype(dtype).name)

    return map_specs(keep, blueprint)
