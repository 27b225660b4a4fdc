"""Rounding matrices to few bits, each block to multiples of a scale of its own."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from glm5_jax.quantization import Scheme

_LARGEST = {"float8_e4m3fn": 448.0, "int8": 127.0, "int4": 7.0}  # symmetric: -8 is not used


class Rounded(NamedTuple):
    """A matrix in few bits."""

    values: np.ndarray  # of int4 as int8
    scales: np.ndarray  # float32, one for each block, partial ones included


def rounded(matrix: np.ndarray, scheme: Scheme) -> Rounded:
    """Rounds a matrix to nearest; the largest of a block becomes the largest that there is.

    Args:
      matrix: float32; its first row begins a block.
    """
    rows, columns = scheme.block(matrix.shape)
    top, left = np.arange(0, matrix.shape[0], rows), np.arange(0, matrix.shape[1], columns)
    reach = np.maximum.reduceat(np.abs(matrix), left, axis=1)
    reach = np.maximum.reduceat(reach, top, axis=0)
    scales = np.where(reach > 0, reach / _LARGEST[scheme.kind], 1).astype(np.float32)
    # A scale that underflowed would make infinities of what it should divide.
    scales = np.maximum(scales, np.finfo(np.float32).tiny)
    wide = np.repeat(np.repeat(scales, rows, 0)[: len(matrix)], columns, 1)[:, : matrix.shape[1]]
    scaled = matrix / wide
    if scheme.kind != "float8_e4m3fn":
        scaled = np.rint(scaled)
    largest = _LARGEST[scheme.kind]
    held = "int8" if scheme.kind == "int4" else scheme.kind
    return Rounded(np.clip(scaled, -largest, largest).astype(jnp.dtype(held)), scales)
