"""RMS norm and layer norm, computed in float32."""

import functools

import jax
import jax.numpy as jnp

from glm5_jax.collectives import alike
from glm5_jax.linear import sum_of_product


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Divides the last axis by its root mean square.

    The normalised value is rounded to the dtype of `x` before it is scaled, as in the reference.

    Source: arXiv:1910.07467.
    """
    return _rms_norm(eps, *alike(x, scale))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rms_norm(eps: float, x: jax.Array, scale: jax.Array) -> jax.Array:
    normed, _ = _normed(eps, x)
    return normed.astype(x.dtype) * scale.astype(x.dtype)


def _normed(eps: float, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The normalised value, and what it was multiplied by."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return x32 * inverse, inverse


def _forward(
    eps: float, x: jax.Array, scale: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _rms_norm(eps, x, scale), (x, scale)


def _backward(
    eps: float, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Computes the normalised value again, so that no more than the input is kept."""
    x, scale = saved
    normed, inverse = _normed(eps, x)
    rounded, scale_rounded = (each.astype(x.dtype).astype(jnp.float32) for each in (normed, scale))
    gradient, last = gradient.astype(jnp.float32), x.ndim - 1
    by_scale = sum_of_product(gradient, rounded, tuple(range(last)))
    by_normed = gradient * scale_rounded
    along = sum_of_product(by_normed, normed, (last,))[..., None] / x.shape[-1]
    return (inverse * (by_normed - normed * along)).astype(x.dtype), by_scale.astype(scale.dtype)


_rms_norm.defvjp(_forward, _backward)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """Subtracts the mean of the last axis and divides by its standard deviation.

    Source: arXiv:1607.06450.
    """
    x32 = x.astype(jnp.float32)
    centered = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    normed = centered * jax.lax.rsqrt(jnp.mean(jnp.square(centered), -1, keepdims=True) + eps)
    return (normed * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)
