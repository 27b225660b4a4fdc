import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.attention import expanded_attention
from glm5_jax.collectives import standing_in_for
from glm5_jax.queries import map_queries

BATCH, QUERIES, HEADS, WIDTH, VALUE = 2, 24, 8, 12, 6
SCALE = 0.4


def given(num_keys, first, dtype=jnp.float32):
    """Queries at positions from `first` on, which see some of the tokens up to themselves."""
    keys = jax.random.split(jax.random.key(0), 4)
    query = jax.random.normal(keys[0], (BATCH, QUERIES, HEADS, WIDTH), dtype)
    key = jax.random.normal(keys[1], (BATCH, num_keys, HEADS, WIDTH), dtype)
    value = jax.random.normal(keys[2], (BATCH, num_keys, HEADS, VALUE), dtype)
    position = first + jnp.arange(QUERIES)[:, None]
    seen = jax.random.bernoulli(keys[3], 0.2, (BATCH, QUERIES, num_keys))
    seen = (seen | (jnp.arange(num_keys) == position)) & (jnp.arange(num_keys) <= position)
    return query, key, value, seen


def attended(platform, *arrays, block=QUERIES):
    """As an accelerator or a CPU computes it, a block of queries at a time."""
    query, key, value, seen = arrays
    with standing_in_for(platform):
        return map_queries(
            lambda query, seen: expanded_attention(query, key, value, seen, scale=SCALE),
            block,
            query,
            seen,
        )


@pytest.mark.parametrize("first", [0, 270, 600, 900, 1076], ids=lambda first: f"from{first}")
@pytest.mark.parametrize("block", [QUERIES, 7])
def test_heads_that_take_turns_attend_as_all_at_once(first, block):
    arrays = given(1100, first)
    expected = attended("tpu", *arrays)
    actual = attended("cpu", *arrays, block=block)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize("first", [30, 400, 1076], ids=lambda first: f"from{first}")
@pytest.mark.parametrize("block", [QUERIES, 7])
def test_their_gradients_are_the_same(first, block):
    *arrays, seen = given(1100, first)
    keys = jax.random.split(jax.random.key(1), 2)
    by_value = jax.random.normal(keys[0], (BATCH, QUERIES, HEADS, VALUE))
    by_total = jax.random.normal(keys[1], (BATCH, QUERIES, HEADS))

    def loss(platform, block, *arrays):
        out = attended(platform, *arrays, seen, block=block)
        return jnp.sum(by_value * out.values) + jnp.sum(by_total * out.log_total_BTN)

    gradient = jax.grad(loss, argnums=(2, 3, 4))
    expected = gradient("tpu", QUERIES, *arrays)
    for a, b in zip(gradient("cpu", block, *arrays), expected, strict=True):
        assert jnp.max(jnp.abs(b)) > 0.1
        np.testing.assert_allclose(a, b, atol=5e-6)


def test_bfloat16_is_accumulated_in_float32():
    arrays = given(300, 270, jnp.bfloat16)
    widened = [x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in arrays]
    expected = attended("cpu", *widened)
    actual = attended("cpu", *arrays)
    assert actual.values.dtype == jnp.bfloat16 and actual.mass.dtype == jnp.float32
    np.testing.assert_allclose(actual.mass, expected.mass, atol=2e-5)
    np.testing.assert_allclose(actual.values.astype(jnp.float32), expected.values, atol=2e-2)


def test_a_query_that_sees_nothing_gets_zeros_and_teaches_nothing():
    query, key, value, seen = given(300, 270)
    seen = seen.at[:, 3].set(False)

    def loss(*arrays):
        return jnp.sum(jnp.square(attended("cpu", *arrays, seen).values))

    out = attended("cpu", query, key, value, seen)
    assert not out.values[:, 3].any() and not out.mass[:, 3].any()
    gradients = jax.grad(loss, argnums=(0, 1, 2))(query, key, value)
    assert not gradients[0][:, 3].any() and gradients[0][:, 4].any()
    assert all(jnp.all(jnp.isfinite(gradient)) for gradient in gradients)


def test_a_gradient_forms_scores_only_once_again():
    """What a block keeps is named, so that only the backward pass itself needs its scores."""
    *arrays, seen = given(300, 270)

    def loss(*arrays):
        return jnp.sum(jnp.square(attended("cpu", *arrays, seen, block=8).values))

    counted = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arrays).compile().as_text()
    exponentials = [line for line in counted.splitlines() if " exponential(" in line]
    assert len(exponentials) == 2, "one forward, one backward"
