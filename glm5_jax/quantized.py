"""Weights kept in 8 or 4 bits, with a float32 scale for each block of them.

They take the place of arrays in a model. What computes with them multiplies them out where it does,
a layer or an expert at a time, so that all products are those of a model of plain arrays.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm5_jax.bits import from_bits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A weight: each value times the scale of its block.

    Both arrays have the weight's axes. Along each of them the blocks are of one size, which is the
    number of values to a scale. Values of 4 bits are bytes of `packed` rows: of arrays of int4, XLA
    for TPUs (libtpu 0.0.42) makes wider copies whole before a loop that indexes them.
    """

    values: jax.Array
    scales: jax.Array
    kind: str = dataclasses.field(metadata={"static": True})  # of the values: a dtype's name
    dtype: str = dataclasses.field(metadata={"static": True})  # that products are rounded to

    def __getitem__(self, index: jax.Array) -> "Quantized":
        """One of a stack of weights."""
        return dataclasses.replace(self, values=self.values[index], scales=self.scales[index])

    def multiplied_out(self) -> jax.Array:
        """The plain weight, rounded from float32 once."""
        return multiply_out(self.values, self.scales, self.kind, self.dtype)


def is_quantized(node: Any) -> bool:
    """Whether a node of a model is a weight that is kept in few bits."""
    return isinstance(node, Quantized)


def multiplied_out(weight: Any) -> Any:
    """A weight as it is computed with."""
    return weight.multiplied_out() if is_quantized(weight) else weight


@functools.partial(jax.jit, static_argnums=(2, 3))
def multiply_out(values: jax.Array, scales: jax.Array, kind: str, dtype: str) -> jax.Array:
    """Values times the scales of their blocks, computed in float32."""
    values = unpacked(values) if kind == "int4" else from_bits(values, kind)
    wide = values.astype(jnp.float32) * every_scale(scales, values.shape)
    return wide.astype(dtype)


MULTIPLY_OUT = "multiply_out"  # the name of the call in traces, where its bytes are counted


def every_scale(scales: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The scale of every value, from those of the blocks; without data of its own in a program."""
    apart = [(count, size // count) for count, size in zip(scales.shape, shape, strict=True)]
    spaced = scales.reshape([size for count, _ in apart for size in (count, 1)])
    return jnp.broadcast_to(spaced, sum(apart, ())).reshape(shape)


def repeated(scales: Any, times: Sequence[int]) -> Any:
    """Scales of smaller blocks: each one several times along every axis."""
    for axis, number in enumerate(times):
        if number > 1:
            scales = scales.repeat(number, axis)
    return scales


def packed(values: np.ndarray) -> np.ndarray:
    """Values from -8 to 7 in pairs of rows: a byte has the even row's in its low bits.

    Rows, not columns: to lay them out side by side again is no work for any device.
    """
    nibbles = values.astype(np.int8).view(np.uint8) & 0xF
    return nibbles[..., ::2, :] | nibbles[..., 1::2, :] << 4


def unpacked(pairs: Any) -> Any:
    """Undoes `packed`, as int8; of arrays of JAX or of numpy."""
    nibbles = pairs.__array_namespace__().stack([pairs & 0xF, pairs >> 4], axis=-2)
    *others, rows, columns = pairs.shape
    values = nibbles.astype(jnp.int8).reshape(*others, 2 * rows, columns)
    return (values ^ 8) - 8  # from 0 to 15, of which the upper half is negative
