import functools

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax import topk
from glm5_jax.candidates import highest
from glm5_jax.topk import positions_of_highest

chosen = jax.jit(positions_of_highest, static_argnums=1)


def first_highest(scores, most):
    """By sorting, which keeps the order of equal scores; then in order of position."""
    return np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :most], axis=1)


@pytest.mark.parametrize("num_columns", [16, 64, 100, 2048])
@pytest.mark.parametrize("most", [1, 8, 16])
def test_positions_are_those_that_sorting_finds(num_columns, most):
    scores = np.random.default_rng(0).standard_normal((9, num_columns), np.float32)
    np.testing.assert_array_equal(chosen(scores, most), first_highest(scores, most))


def test_of_equal_scores_the_first_are_chosen():
    """Most scores of an indexer may be zero, of either sign."""
    rng = np.random.default_rng(1)
    scores = rng.integers(-2, 3, (40, 300)).astype(np.float32)
    scores[:5] = 0
    scores[rng.random(scores.shape) < 0.1] = -0.0
    np.testing.assert_array_equal(chosen(scores, 120), first_highest(scores, 120))


def test_queries_that_see_fewer_tokens_get_them_all():
    rng = np.random.default_rng(2)
    scores = rng.standard_normal((70, 70), np.float32)
    scores[np.triu_indices(70, 1)] = -np.inf
    found = np.asarray(chosen(scores, 32))
    np.testing.assert_array_equal(found, first_highest(scores, 32))
    valid = np.take_along_axis(scores, found, axis=1) > -np.inf
    np.testing.assert_array_equal(valid.sum(axis=1), np.minimum(np.arange(70) + 1, 32))


def test_every_order_of_magnitude_is_told_apart():
    tiny, huge = np.finfo(np.float32).tiny, np.finfo(np.float32).max
    row = np.array([0, tiny, -tiny, 1, 1 + 2**-23, -huge, huge, -np.inf, 1 - 2**-24, -1])
    scores = np.stack([np.roll(row, shift) for shift in range(10)]).astype(np.float32)
    for most in range(1, 11):
        np.testing.assert_array_equal(chosen(scores, most), first_highest(scores, most))


def test_blocks_of_rows_are_alike(monkeypatch):
    scores = np.random.default_rng(3).standard_normal((10, 128), np.float32)
    monkeypatch.setattr(topk, "_BLOCK_BYTES", 4 * 128 * 3)  # the last block is not full
    found = jax.jit(functools.partial(positions_of_highest, most=20))(scores)
    np.testing.assert_array_equal(found, first_highest(scores, 20))


@hypothesis.given(
    hypothesis.extra.numpy.arrays(
        np.float32,
        (6, 70),
        elements=st.floats(width=32, allow_nan=False, allow_subnormal=False),
        fill=st.sampled_from([0.0, -np.inf, 1.0]),
    )
)
def test_any_scores_are_ranked_as_by_sorting(scores):
    np.testing.assert_array_equal(chosen(scores, 17), first_highest(scores, 17))


def test_more_are_counted_than_a_byte_holds():
    """Of 70,000 equal scores every lane has more than 127, and the columns are of three parts."""
    scores = np.zeros((2, 70_000), np.float32)
    scores[1] = np.random.default_rng(5).standard_normal(70_000)
    for most in (300, 69_000):
        np.testing.assert_array_equal(chosen(scores, most), first_highest(scores, most))


def test_what_is_no_number_does_no_harm():
    scores = np.zeros((3, 64), np.float32)
    scores[1, 5] = np.nan
    found = np.asarray(chosen(scores, 8))
    np.testing.assert_array_equal(found[[0, 2]], [np.arange(8)] * 2)
    assert ((found >= 0) & (found < 64)).all()


@pytest.mark.parametrize("shape", [(2, 3, 400), (2, 40, 400)], ids=["few", "many"])
def test_many_queries_get_what_few_get(shape):
    scores = np.random.default_rng(4).integers(-9, 9, shape).astype(np.float32)
    found = highest(jnp.array(scores), 50)
    taken = np.take_along_axis(scores, np.asarray(found.index_BTK), axis=-1)
    np.testing.assert_array_equal(found.score_BTK, taken)
    expected = first_highest(scores.reshape(-1, 400), 50)
    actual = np.sort(found.index_BTK, axis=-1).reshape(-1, 50)
    np.testing.assert_array_equal(actual, expected)
