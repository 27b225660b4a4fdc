import jax
import jax.numpy as jnp
import numpy as np

from glm5_jax.norm import layer_norm, rms_norm
from tests.reference import numpy_glm5


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def test_rms_norm_divides_by_the_root_mean_square():
    x, scale = arrays((3, 16), (16,))
    expected = numpy_glm5.rms_norm(x.astype(np.float64), scale, 1e-5)
    np.testing.assert_allclose(rms_norm(jnp.asarray(x), jnp.asarray(scale), 1e-5), expected, 1e-5)


def test_rms_norm_rounds_before_it_scales():
    x, scale = (jnp.asarray(a, jnp.bfloat16) for a in arrays((3, 16), (16,)))
    unscaled = rms_norm(x, jnp.ones_like(scale), 1e-5)
    assert unscaled.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rms_norm(x, scale, 1e-5), unscaled * scale)


def test_layer_norm_subtracts_the_mean():
    x, scale, bias = arrays((3, 16), (16,), (16,))
    expected = numpy_glm5.layer_norm(x.astype(np.float64), scale, bias)
    actual = layer_norm(*(jnp.asarray(a) for a in (x, scale, bias)), eps=1e-6)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_norms_of_bfloat16_are_computed_in_float32():
    x = jax.random.normal(jax.random.key(0), (4, 4096)).astype(jnp.bfloat16) + 100
    ones = jnp.ones(4096, jnp.bfloat16)
    exact = numpy_glm5.layer_norm(np.asarray(x, np.float64), np.ones(4096), np.zeros(4096))
    actual = layer_norm(x, ones, jnp.zeros_like(ones), 1e-6)
    np.testing.assert_allclose(actual.astype(jnp.float32), exact, atol=0.02)
