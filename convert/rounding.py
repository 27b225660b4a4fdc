"""Rounding matrices to few bits, each block to multiples of a scale of its own."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from glm5_jax.errors import InputError
from glm5_jax.published.fp8 import dequantize
from glm5_jax.published.native import NativeSource
from glm5_jax.published.source import PublishedSource
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


class Rows(NamedTuple):
    """Some rows of a matrix, and what they are rounded to."""

    plain: np.ndarray  # float32
    values: np.ndarray
    back: np.ndarray  # float32, multiplied out again
    scales: np.ndarray  # of the blocks that begin in these rows


def rounded_rows(
    source: NativeSource | PublishedSource,
    name: str,
    shape: tuple[int, ...],
    start: int,
    stop: int,
    scheme: Scheme,
) -> Rows:
    """Reads rows of a matrix with the rest of the blocks they are in, and rounds them.

    Args:
      shape: of the whole matrix.

    Raises:
      InputError: some are NaN or infinite.
    """
    step, _ = block = scheme.block(shape)
    first, last = start // step * step, min(-(-stop // step) * step, shape[0])
    plain = source.read(name, first, last).astype(np.float32)
    if not np.isfinite(plain).all():
        raise InputError(f"{source.directory}: {name} has weights that are NaN or infinite")
    values, scales = rounded(plain, scheme)
    back = dequantize(values, scales, 0, block=block)
    own, begun = slice(start - first, stop - first), -(-start // step) - start // step
    return Rows(plain[own], values[own], back[own], scales[begun:])
