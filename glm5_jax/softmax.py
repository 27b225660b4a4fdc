"""Softmax where not everything counts."""

import jax
import jax.numpy as jnp


def softmax_of_seen(
    scores: jax.Array, seen: jax.Array, axis: int = -1
) -> tuple[jax.Array, jax.Array]:
    """Softmax over the seen entries of an axis, and the logarithm of its denominator.

    Hidden scores are finite: a query that sees nothing, as padding does, must not yield NaN.
    """
    scores = jnp.where(seen, scores, jnp.finfo(scores.dtype).min)
    return jax.nn.softmax(scores, axis=axis), jax.nn.logsumexp(scores, axis=axis)
