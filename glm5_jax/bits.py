"""16-bit floats as integers, for arrays that loops index."""

import jax
import jax.numpy as jnp


def as_bits(x: jax.Array) -> jax.Array:
    """The bits of a 16-bit float as uint16; other dtypes as they are.

    XLA's CPU backend computes in float32, and widens the whole of any 16-bit float array that a
    loop indexes, every time. It leaves integers alone. Elsewhere the copy would be for nothing.
    """
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def from_bits(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Undoes `as_bits`."""
    return jax.lax.bitcast_convert_type(x, dtype) if x.dtype == jnp.uint16 else x
