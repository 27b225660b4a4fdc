import functools

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.candidates import Candidates, highest, within_sight

MOST = 8
FEW = st.sampled_from([-np.inf, -3e38, -1.0, 0.0, 1e-40, 0.5, 0.5000001, 1.0, 3e38])
ROWS = hypothesis.extra.numpy.arrays(
    np.float32, (1, 3, 40), elements=FEW | st.floats(-2, 2, width=32)
)


def first_of_sorted(scores_BTS, most):
    """The positions of the highest scores, the lowest first among equal ones."""
    order = np.lexsort(
        (np.broadcast_to(np.arange(scores_BTS.shape[-1]), scores_BTS.shape), -scores_BTS)
    )
    return order[..., :most]


@hypothesis.given(ROWS)
def test_the_highest_are_exact_whatever_the_scores_are(scores_BTS):
    scores_BTS = scores_BTS + 0  # lax.top_k has 0 above -0, which no sum of scores is
    assert scores_BTS.shape[-1] >= 4 * MOST  # so that a bound is sought
    found = jax.jit(functools.partial(highest, most=MOST))(scores_BTS)
    expected = first_of_sorted(scores_BTS, MOST)
    is_seen = np.take_along_axis(scores_BTS, expected, -1) > -np.inf
    np.testing.assert_array_equal(np.asarray(found.index_BTK)[is_seen], expected[is_seen])
    np.testing.assert_array_equal(found.score_BTK, np.take_along_axis(scores_BTS, expected, -1))


@pytest.mark.parametrize("last", [0, 7, 8, 15, 16, 23, 24, 31])
def test_no_more_is_looked_at_than_the_queries_see(last):
    scores_BTS = jax.random.normal(jax.random.key(last), (2, 5, 32))
    seen_BTS = jnp.broadcast_to(jnp.arange(32) <= last, scores_BTS.shape)
    looked_at = []

    def among_first(num_slots):
        jax.debug.callback(lambda: looked_at.append(num_slots))
        masked = jnp.where(seen_BTS[..., :num_slots], scores_BTS[..., :num_slots], -jnp.inf)
        return Candidates(*jax.lax.top_k(masked, MOST))

    found = jax.jit(lambda seen: within_sight(seen, MOST, among_first))(seen_BTS)
    masked = np.where(seen_BTS, scores_BTS, -np.inf)
    expected = first_of_sorted(masked, MOST)[..., : last + 1]
    np.testing.assert_array_equal(found.index_BTK[..., : last + 1], expected)
    jax.effects_barrier()
    assert looked_at == [8 * (last // 8 + 1)]
