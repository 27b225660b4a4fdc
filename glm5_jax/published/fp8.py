"""Weights with one scale per block, as they are published in float8."""

import jax
import numpy as np

SCALE_SUFFIX = "_scale_inv"
BLOCK = 128  # rows and columns that share a scale


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a matrix's scales. The last block of an axis may be partial: 576 rows have 5."""
    return tuple(-(-size // BLOCK) for size in shape)


def dequantize(
    rows: np.ndarray,
    scales: np.ndarray,
    start: int,
    dtype: jax.typing.DTypeLike = np.float32,
    block: tuple[int, int] = (BLOCK, BLOCK),
) -> np.ndarray:
    """Multiplies values by the scale of their block.

    Args:
      rows: rows of the matrix from row `start` on.
      scales: of the whole matrix; despite the published name they are multiplied, not divided by.
      dtype: of the result; products are float32 and rounded to it.
      block: rows and columns that share a scale.

    Returns:
      An array of the shape of `rows`.
    """
    result = np.empty(rows.shape, dtype)
    columns = np.repeat(scales, block[1], axis=1)[:, : rows.shape[1]]
    for first in range(0, rows.shape[0], BLOCK):  # whose products stay in the cache
        part = slice(first, min(first + BLOCK, rows.shape[0]))
        scale = columns[np.arange(start + part.start, start + part.stop) // block[0]]
        with np.errstate(over="ignore", invalid="ignore"):  # who converts them looks for NaN
            result[part] = rows[part].astype(np.float32) * scale
    return result
