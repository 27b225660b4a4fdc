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


def test_gradients_of_rms_norm_are_those_of_its_definition():
    x, scale, weights = (jnp.asarray(a) for a in arrays((2, 5, 16), (16,), (2, 5, 16)))

    def definition(x, scale):
        normed = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-3)
        return jnp.sum(weights * normed * scale)

    def loss(x, scale):
        return jnp.sum(weights * rms_norm(x, scale, 1e-3))

    expected = jax.grad(definition, argnums=(0, 1))(x, scale)
    for a, b in zip(jax.grad(loss, argnums=(0, 1))(x, scale), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_gradients_of_rms_norm_have_the_dtypes_of_their_operands():
    """The scale's is summed over 2,048 rows in float32: in bfloat16 the sum would stand still."""
    x = jax.random.normal(jax.random.key(0), (2048, 16), jnp.bfloat16)
    scale, weights = jnp.ones(16), jnp.abs(x).astype(jnp.float32)

    def loss(x, scale):
        return jnp.sum(rms_norm(x, scale, 1e-5).astype(jnp.float32) * weights)

    by_x, by_scale = jax.grad(loss, argnums=(0, 1))(x, scale)
    assert by_x.dtype == jnp.bfloat16 and by_scale.dtype == jnp.float32
    wide = np.asarray(x, np.float64)
    normed = wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True))
    expected = np.sum(normed * np.asarray(weights, np.float64), axis=0)
    np.testing.assert_allclose(by_scale, expected, atol=1)


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
