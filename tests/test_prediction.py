"""The loss of predicted tokens, whose gradient is found beside it, a block of tokens at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train.prediction
from glm5_jax.places import Places
from tests.tiny import SHARED, random_model
from train.prediction import Sums, next_token_sums

MODEL = random_model(SHARED)
NUM_TOKENS, DIM = MODEL.head.shape
BATCH, LENGTH, Z_WEIGHT = 3, 20, 0.01
RANDOM = np.random.default_rng(0)
TOKENS = jnp.asarray(RANDOM.integers(0, NUM_TOKENS, (BATCH, LENGTH)), jnp.int32)
HIDDEN = jnp.asarray(5 * RANDOM.standard_normal((BATCH, LENGTH, DIM)), jnp.float32)
# A row of two documents, one with padding, one whole.
SEGMENTS = [[1] * 9 + [2] * 11, [1] * 15 + [0] * 5, [1] * LENGTH]
PLACES = Places.packed(jnp.asarray(SEGMENTS, jnp.int32))


def found(model, hidden, distance):
    return next_token_sums(model, hidden, TOKENS, PLACES, distance, z_weight=Z_WEIGHT)


def by_hand(model, hidden, distance):
    """The same by its definition, of all scores at once."""
    scores = jnp.einsum("btd,zd->btz", hidden, model.head, precision="highest")[:, :-distance]
    following = TOKENS[:, distance:, None]
    log_total = jax.nn.logsumexp(scores, axis=-1)
    nats = log_total - jnp.take_along_axis(scores, following, axis=-1)[..., 0]
    ends = [
        [i + distance < LENGTH and row[i] == row[i + distance] != 0 for i in range(LENGTH)]
        for row in SEGMENTS
    ]
    counted = jnp.asarray(ends)[:, :-distance]
    nats, z = (jnp.sum(jnp.where(counted, each, 0)) for each in (nats, log_total**2))
    return Sums(nats, z, nats + Z_WEIGHT * z)


@pytest.fixture(params=[1, 4, 100], ids="{} tokens a block".format)
def blocks(request, monkeypatch):
    """So many tokens of each row in a block: of 19 or 18 the last block is not full."""
    monkeypatch.setattr(train.prediction, "_block_length", lambda *_: request.param)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("distance", [1, 2])
def test_sums_and_gradient_are_those_of_the_definition(distance):
    for sum_found, expected in zip(
        found(MODEL, HIDDEN, distance), by_hand(MODEL, HIDDEN, distance), strict=True
    ):
        np.testing.assert_allclose(sum_found, expected, rtol=1e-5)

    def gradient(function):
        def scaled(model, hidden):
            return 0.25 * function(model, hidden, distance).minimised

        of_model, of_hidden = jax.jit(jax.grad(scaled, argnums=(0, 1)))(MODEL, HIDDEN)
        return of_model.head, of_hidden

    for part, expected in zip(gradient(found), gradient(by_hand), strict=True):
        np.testing.assert_allclose(part, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.usefixtures("blocks")
def test_a_gradient_multiplies_with_the_head_three_times():
    """Once for the scores, once for each operand's gradient: scores are not computed again."""

    def minimised(model, hidden):
        return found(model, hidden, 1).minimised

    text = jax.jit(jax.grad(minimised, argnums=(0, 1))).lower(MODEL, HIDDEN).as_text()
    assert text.count("stablehlo.dot_general") == 3


def test_in_bfloat16_many_blocks_are_as_exact_as_one(monkeypatch):
    """Their gradients of the head are added up in float32, and rounded once."""
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), MODEL)
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    hidden = HIDDEN.astype(jnp.bfloat16)

    def gradient(function, model, hidden):
        return jax.grad(lambda model: function(model, hidden, 1).minimised)(model).head

    expected = gradient(by_hand, exact, hidden.astype(jnp.float32))

    def error():
        of_half = gradient(found, half, hidden)
        assert of_half.dtype == jnp.bfloat16
        return jnp.linalg.norm(of_half.astype(jnp.float32) - expected)

    of_one_block = error()
    monkeypatch.setattr(train.prediction, "_block_length", lambda *_: 1)
    assert error() < 1.1 * of_one_block
