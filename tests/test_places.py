import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np

from glm5_jax.places import Places, visible


def test_positions_of_padded_rows_count_tokens_only():
    real = jnp.array([[0, 0, 1, 1], [1, 1, 1, 0]], bool)
    places = Places.padded(real)
    np.testing.assert_array_equal(places.position_BT, [[0, 0, 0, 1], [0, 1, 2, 2]])
    np.testing.assert_array_equal(places.real_BT, real)


def test_positions_restart_with_every_packed_sequence():
    places = Places.packed(jnp.array([[1, 1, 1, 2, 2, 0, 0]]))
    np.testing.assert_array_equal(places.position_BT, [[0, 1, 2, 0, 1, 0, 1]])


@hypothesis.given(st.lists(st.integers(0, 3), min_size=1, max_size=12).map(sorted))
def test_a_token_sees_itself_and_what_is_before_it_in_its_sequence(segments):
    segments = np.array(segments)
    places = Places.packed(jnp.asarray(segments)[None])
    seen = np.asarray(visible(places, places))[0]
    for query in range(len(segments)):
        for key in range(len(segments)):
            same = segments[query] == segments[key] > 0
            assert seen[query, key] == (same and key <= query)
