import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np

from glm5_jax.published.fp8 import dequantize, scale_shape


def test_576_rows_have_five_blocks():
    assert scale_shape((576, 6144)) == (5, 48)


def random_matrix(rows, columns, seed=0):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, columns)).astype(jnp.float8_e4m3fn)
    return values, rng.uniform(0.1, 2, scale_shape(values.shape)).astype(np.float32)


@hypothesis.given(st.integers(1, 300), st.integers(1, 300))
@hypothesis.example(576, 192)
@hypothesis.settings(max_examples=20)
def test_every_value_is_multiplied_by_the_scale_of_its_block(rows, columns):
    values, scales = random_matrix(rows, columns)
    actual = dequantize(values, scales, start=0)
    assert actual.dtype == np.float32
    for i in {0, rows // 2, rows - 1}:
        for j in {0, columns // 2, columns - 1}:
            assert actual[i, j] == np.float32(values[i, j]) * scales[i // 128, j // 128]


@hypothesis.given(st.integers(0, 575), st.integers(1, 576))
def test_rows_in_the_middle_find_their_scales(start, length):
    values, scales = random_matrix(576, 16)
    stop = min(start + length, 576)
    whole = dequantize(values, scales, start=0)
    np.testing.assert_array_equal(dequantize(values[start:stop], scales, start), whole[start:stop])
