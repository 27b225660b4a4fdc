"""Weights published as float8 with one scale per block."""

import numpy as np

SCALE_SUFFIX = "_scale_inv"
BLOCK = 128  # rows and columns that share a scale


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a matrix's scales. The last block of an axis may be partial: 576 rows have 5."""
    return tuple(-(-size // BLOCK) for size in shape)


def dequantize(rows: np.ndarray, scales: np.ndarray, start: int) -> np.ndarray:
    """Multiplies float8 values by the scale of their block.

    Args:
      rows: rows of the matrix from row `start` on.
      scales: of the whole matrix; despite the published name they are multiplied, not divided by.

    Returns:
      float32, of the shape of `rows`.
    """
    row_block = (start + np.arange(rows.shape[0])) // BLOCK
    column_block = np.arange(rows.shape[1]) // BLOCK
    return rows.astype(np.float32) * scales[row_block][:, column_block]
