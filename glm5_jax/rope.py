"""Rotary position embedding."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Rotation(NamedTuple):
    """The angle of every pair of dimensions at every token, as float32 cosine and sine."""

    cos_BTP: jax.Array
    sin_BTP: jax.Array


def rotation(position_BT: jax.Array, rope_dim: int, theta: float) -> Rotation:
    """The rotation of `rope_dim // 2` pairs: pair j turns by `position * theta^(-2j / rope_dim)`.

    Source: arXiv:2104.09864, section 3.4.2.
    """
    angle_BTP = position_BT[..., None].astype(jnp.float32) * _frequencies(rope_dim, theta)
    return Rotation(jnp.cos(angle_BTP), jnp.sin(angle_BTP))


def _frequencies(rope_dim: int, theta: float) -> np.ndarray:
    """`theta^(-2j / rope_dim)` in float32, as one over the power, each rounded.

    A position multiplies what rounding leaves of a frequency. So the published implementation's
    rounding is kept: at 8,192 tokens the nearest float32 would turn by up to 6e-5 more or less,
    which is a thousand times float32's own error and enough to select other tokens.
    """
    power_P = np.float64(np.float32(theta)) ** (np.arange(0, rope_dim, 2) / rope_dim)
    return np.float32(1) / power_P.astype(np.float32)


def rotate(x: jax.Array, turn: Rotation, *, interleaved: bool) -> jax.Array:
    """Rotates the pairs of the last axis.

    Args:
      x: [B, T, R], or [B, T, N, R] with heads.
      interleaved: pairs are (0, 1), (2, 3), ... as in GLM-5; otherwise (0, R/2), (1, R/2 + 1), ...

    Returns:
      In the shape and dtype of `x`: the first member of every pair, then the second member of
      every pair. Interleaved input is thus reordered, queries and keys alike, which leaves their
      products as they were and spares an interleaving copy.
    """
    cos, sin = turn
    if x.ndim == 4:
        cos, sin = cos[:, :, None], sin[:, :, None]
    x32 = x.astype(jnp.float32)
    if interleaved:
        pairs = x32.reshape(*x.shape[:-1], -1, 2)
        first, second = pairs[..., 0], pairs[..., 1]
    else:
        first, second = jnp.split(x32, 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
