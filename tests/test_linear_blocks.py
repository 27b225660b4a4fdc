"""Large bfloat16 weights on CPU: multiplied by blocks, with no float32 copy of the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.bits import as_bits, from_bits
from glm5_jax.linear import project_f32


def operands(rows: int, num_out: int, width: int) -> tuple[jax.Array, jax.Array]:
    random = np.random.default_rng(0)
    x, weight = random.standard_normal((rows, width)), random.standard_normal((num_out, width))
    return jnp.asarray(x, jnp.bfloat16), jnp.asarray(weight, jnp.bfloat16)


def product(x: jax.Array, weight: jax.Array) -> jax.Array:
    return project_f32("RD,ED->RE", x, weight)


@pytest.mark.parametrize(
    ("num_out", "width"),
    [
        (6144, 512),  # three blocks
        (4 * 1021, 1024),  # no divisor near a block's rows
        (3, 2**20 + 1),  # a row is more than a block
        (100, 8),  # less than a block
    ],
)
def test_the_product_and_its_gradients_are_those_of_the_whole(num_out, width):
    x, weight = operands(2, num_out, width)
    wide = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    found, pull = jax.vjp(jax.jit(product), x, weight)
    size = np.sqrt(width)
    np.testing.assert_allclose(np.asarray(found) / size, wide[0] @ wide[1].T / size, atol=1e-5)
    for_x, for_weight = pull(jnp.ones_like(found))
    expected = (
        np.broadcast_to(wide[1].sum(0), x.shape),
        np.broadcast_to(wide[0].sum(0), wide[1].shape),
    )
    for gradient, each in zip((for_x, for_weight), expected, strict=True):
        np.testing.assert_allclose(np.asarray(gradient, np.float64), each, rtol=2**-8, atol=1e-3)


def test_no_copy_is_made_of_a_large_weight_that_is_held_as_bits():
    x, weight = operands(1, 16384, 512)
    compiled = jax.jit(lambda x, bits: product(x, from_bits(bits, x.dtype)))
    memory = compiled.lower(x, as_bits(weight)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * weight.size / 3
