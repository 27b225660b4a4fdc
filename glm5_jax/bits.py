"""Small floats as integers, for arrays that loops index."""

import jax
import jax.numpy as jnp

_BITS: dict[int, jnp.dtype] = {1: jnp.dtype("uint8"), 2: jnp.dtype("uint16")}  # by bytes


def as_bits(x: jax.Array) -> jax.Array:
    """The bits of a float of 8 or 16 bits as an unsigned integer; other dtypes as they are.

    XLA's CPU backend computes in float32, and widens the whole of any array of such floats that a
    loop indexes, every time. It leaves integers alone. Elsewhere the copy would be for nothing.
    """
    bits = _BITS.get(x.dtype.itemsize)
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    return jax.lax.bitcast_convert_type(x, bits) if bits and is_float else x


def from_bits(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Undoes `as_bits`."""
    return jax.lax.bitcast_convert_type(x, dtype) if x.dtype in _BITS.values() else x
