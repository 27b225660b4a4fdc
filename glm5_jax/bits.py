"""Small numbers as whole bytes, for arrays that loops index."""

import jax
import jax.numpy as jnp

_BITS: dict[int, jnp.dtype] = {1: jnp.dtype("uint8"), 2: jnp.dtype("uint16")}  # by bytes


def as_bits(x: jax.Array) -> jax.Array:
    """What loops on a CPU can index: the bits of small floats as unsigned integers, int4 as int8.

    XLA's CPU backend computes in float32, and widens the whole of any array of floats of 8 or 16
    bits that a loop indexes, every time; of 4 bits, too. It leaves whole bytes alone. Elsewhere the
    copy would be for nothing.
    """
    if x.dtype == jnp.int4:
        return x.astype(jnp.int8)
    bits = _BITS.get(x.dtype.itemsize)
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    return jax.lax.bitcast_convert_type(x, bits) if bits and is_float else x


def from_bits(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Undoes `as_bits` for floats; int8 does as well as int4."""
    return jax.lax.bitcast_convert_type(x, dtype) if x.dtype in _BITS.values() else x
