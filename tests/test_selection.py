import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.places import Places
from glm5_jax.selection import Selection, divergence

BATCH, QUERIES, TOKENS, HEADS = 1, 16, 256, 8
HIDDEN = float(np.finfo(np.float32).min)


def attention_and_log_share(distance):
    """What heads give every token, and an expectation that far off; some tokens are hidden."""
    rng, shape = np.random.default_rng(0), (BATCH, QUERIES, TOKENS)
    seen = np.arange(TOKENS) < rng.integers(1, TOKENS + 1, (BATCH, QUERIES, 1))
    scores = np.where(seen, 2 * rng.standard_normal(shape), -np.inf)
    share = np.exp(scores - np.log(np.exp(scores).sum(-1, keepdims=True)))
    expected = np.where(seen, scores + distance * rng.standard_normal(shape), HIDDEN)
    log_share = jax.nn.log_softmax(jnp.array(expected, jnp.float32), axis=-1)
    return (HEADS * share).astype(np.float32), log_share


def exact(mass, log_share):
    """The divergence and its gradient, in float64, of the distributions that float32 stands for."""
    mass, log_share = np.float64(mass), np.float64(log_share)
    share = mass / mass.sum(-1, keepdims=True)
    other = np.exp(log_share)
    log_share = log_share - np.log(other.sum(-1, keepdims=True))
    each = np.where(share > 0, share * (np.log(np.where(share > 0, share, 1)) - log_share), 0)
    return each.sum(), other - share


@pytest.mark.parametrize("distance", [1, 0.1, 0.01, 1e-3])
def test_a_small_divergence_is_not_lost_in_rounding(distance):
    mass, log_share = attention_and_log_share(distance)
    counted = jnp.ones((BATCH, QUERIES), bool)
    nats, gradient = jax.value_and_grad(
        lambda log_share: divergence(mass, Selection(log_share=log_share), counted)
    )(log_share)
    expected, slope = exact(mass, log_share)
    np.testing.assert_allclose(nats, expected, rtol=1e-4)
    np.testing.assert_allclose(gradient, slope, atol=1e-7)


def test_a_token_without_attention_costs_nothing_but_is_unlearnt():
    log_share = jnp.log(jnp.array([[[0.25, 0.5, 0.25]]]))
    mass = jnp.array([[[8.0, 0.0, 0.0]]])
    nats, gradient = jax.value_and_grad(
        lambda log_share: divergence(mass, Selection(log_share=log_share), jnp.ones((1, 1), bool))
    )(log_share)
    np.testing.assert_allclose(nats, np.log(4), rtol=1e-6)
    np.testing.assert_allclose(gradient, [[[-0.75, 0.5, 0.25]]], rtol=1e-6)


def test_a_query_that_sees_nothing_has_no_gradient():
    mass, log_share = attention_and_log_share(1)
    counted = jnp.ones((BATCH, QUERIES), bool).at[0, 0].set(False)

    def nats(mass):
        return lambda log_share: divergence(mass, Selection(log_share=log_share), counted)

    expected = jax.value_and_grad(nats(mass))(log_share)
    hidden = jnp.full(TOKENS, HIDDEN)
    unseen = nats(jnp.array(mass).at[0, 0].set(0))
    actual = jax.value_and_grad(unseen)(log_share.at[0, 0].set(jax.nn.log_softmax(hidden)))
    np.testing.assert_array_equal(actual[0], expected[0])
    np.testing.assert_array_equal(actual[1], expected[1])


def test_a_place_that_is_not_valid_hides_no_token():
    """Where less is visible than selected, those places may name any token, selected ones too."""
    index, valid = jnp.array([[[3, 5, 3, 3, 1]]]), jnp.array([[[False, True, True, False, False]]])
    seen = Selection(index, valid).seen(Places.unpadded(1, 1), Places.unpadded(1, 8))
    np.testing.assert_array_equal(np.flatnonzero(seen), [3, 5])
