"""Weights that are NaN or infinite."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from glm5_jax.console import notice
from glm5_jax.errors import InputError
from glm5_jax.published.families import by_family
from glm5_jax.remote import AnyPath

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


def tell_not_finite(
    directory: AnyPath, records: Iterable[Mapping[str, Any]], *, strict: bool
) -> None:
    """Tells of weights of a source that are NaN or infinite, or became it by rounding.

    Args:
      records: of all shards; `not_finite` counts such weights by tensors.

    Raises:
      InputError: there are some, and they are refused.
    """
    found = {name: count for record in records for name, count in record["not_finite"].items()}
    if not found:
        return
    families = by_family((name, "has weights that are NaN or infinite") for name in found)
    said = "; ".join(
        f"{subject} {what} ({sum(found[name] for name in names):,})"
        for subject, what, names in families
    )
    if strict:
        raise InputError(f"{directory}: {said}; refused by --strict")
    notice(f"{directory}: {said}")
