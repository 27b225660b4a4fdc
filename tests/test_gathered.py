"""Gathered attention and its gradient against their definition, which JAX derives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.collectives import standing_in_for
from glm5_jax.gathered import gathered_attention

BATCH, QUERIES, HEADS, KEYS, WIDTH, SCALE = 2, 7, 8, 12, 10, 0.3


def given(dtype=jnp.float32):
    """Queries that see all, some, one and none of the keys they have gathered."""
    keys = jax.random.split(jax.random.key(0), 2)
    query = jax.random.normal(keys[0], (BATCH, QUERIES, HEADS, WIDTH), jnp.bfloat16)
    rows = jax.random.normal(keys[1], (BATCH, QUERIES, KEYS, WIDTH), jnp.bfloat16)
    num_valid = jnp.array([[12, 9, 5, 1, 0, 3, 12], [2, 12, 7, 0, 1, 11, 6]])
    return query.astype(dtype), rows.astype(dtype), jnp.arange(KEYS) < num_valid[..., None]


def definition(query, rows, valid):
    """Values, mass and the logarithm of the denominator, of float32."""
    scores = jnp.einsum("btna,btka->btnk", query, rows, precision="highest") * SCALE
    scores = jnp.where(valid[:, :, None], scores, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(scores, axis=-1)
    values = jnp.einsum("btnk,btka->btna", probs, rows, precision="highest")
    return values, jnp.sum(probs, axis=2), jax.nn.logsumexp(scores, axis=-1)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_attention_is_that_of_the_definition(platform):
    with standing_in_for(platform):
        actual = gathered_attention(*given(), scale=SCALE)
    for a, b in zip(actual, definition(*given()), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_gradients_are_those_of_the_definition(platform):
    """Also where a query sees nothing, and through the denominators by which shards are merged."""
    query, rows, valid = given()
    keys = jax.random.split(jax.random.key(1), 2)
    by_values = jax.random.normal(keys[0], query.shape)
    by_total = jax.random.normal(keys[1], query.shape[:3])

    def loss(attend, query, rows):
        values, _, log_total = attend(query, rows, valid)
        return jnp.sum(by_values * values) + jnp.sum(by_total * log_total)

    def attend(query, rows, valid):
        with standing_in_for(platform):
            return gathered_attention(query, rows, valid, scale=SCALE)

    def gradient(attend):
        with standing_in_for(platform):
            return jax.grad(lambda *arrays: loss(attend, *arrays), argnums=(0, 1))(query, rows)

    for a, b in zip(gradient(attend), gradient(definition), strict=True):
        assert jnp.max(jnp.abs(b)) > 1
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-6)


def test_gradients_of_bfloat16_are_near_those_of_float32():
    def gradient(dtype):
        query, rows, valid = given(dtype)

        def loss(query, rows):
            values = gathered_attention(query, rows, valid, scale=SCALE).values
            return jnp.sum(jnp.square(values.astype(jnp.float32)))

        return jax.grad(loss, argnums=(0, 1))(query, rows)

    for a, b in zip(gradient(jnp.bfloat16), gradient(jnp.float32), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.02 * float(jnp.max(jnp.abs(b))))
