"""Weights that are NaN or infinite."""

import jax.numpy as jnp
import numpy as np

# The bits that are all set in what is not finite: those of the exponent, and of float8 e4m3 all
# but the sign, for it has no infinity and one NaN.
_MASKS: dict[np.dtype, np.unsignedinteger] = {
    jnp.dtype("float32"): np.uint32(0x7F80_0000),
    jnp.dtype("float16"): np.uint16(0x7C00),
    jnp.dtype("bfloat16"): np.uint16(0x7F80),
    jnp.dtype("float8_e4m3fn"): np.uint8(0x7F),
}
_BLOCK = 2**18  # elements that are looked at together, so that they stay in a cache


def num_not_finite(array: np.ndarray) -> int:
    """How many elements are NaN or infinite; a contiguous array is not copied."""
    mask = _MASKS[array.dtype]
    bits = np.ascontiguousarray(array).view(mask.dtype).reshape(-1)
    masked = np.empty(min(bits.size, _BLOCK), mask.dtype)
    count = 0
    for start in range(0, bits.size, _BLOCK):
        block = bits[start : start + _BLOCK]
        exponents = np.bitwise_and(block, mask, out=masked[: block.size])
        if exponents.max(initial=0) == mask:  # faster than counting, and hardly ever so
            count += int(np.count_nonzero(exponents == mask))
    return count
