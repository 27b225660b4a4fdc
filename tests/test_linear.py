"""Products as einsums have them, however a CPU is told to compute them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.linear import project_f32

SIZES = dict(zip("BTDFNXQ", (2, 24, 16, 12, 4, 6, 10), strict=True))


def operands(subscripts, dtype=np.float32):
    random = np.random.default_rng(0)
    shapes = [[SIZES[axis] for axis in axes] for axes in subscripts.split("->")[0].split(",")]
    return [random.standard_normal(shape).astype(dtype) for shape in shapes]


@pytest.mark.parametrize(
    "subscripts",
    [
        "BTD,FD->BTF",  # a product with a weight, and its gradients
        "BTF,FD->BTD",
        "BTF,BTD->FD",
        "BTQ,NXQ->BTNX",
        "BTNX,NXQ->BTQ",
        "BTNX,BTQ->NXQ",
        "BTNX,DNX->BTD",
        "BT,BTD->D",  # of which one operand has nothing but what is summed over
        "BTD,BT->D",
        "BTNX,NXD->BTND",  # with an axis that both have and the result, too
        "BTND,BTNX->NXD",
        "BTD,BTF->BDF",
        "TD,BF->TDBF",  # with nothing that is summed over
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_a_product_and_its_gradients_are_those_of_the_einsum(subscripts, dtype):
    x, weight = operands(subscripts, dtype)

    def product(x, weight):
        return project_f32(subscripts, x, weight)

    found, pull = jax.vjp(jax.jit(product), jnp.asarray(x), jnp.asarray(weight))
    wide = [operand.astype(np.float64) for operand in (x, weight)]
    np.testing.assert_allclose(found, np.einsum(subscripts, *wide), atol=2e-5)
    given = np.random.default_rng(1).standard_normal(found.shape).astype(dtype)
    inputs, result = subscripts.split("->")
    x_axes, weight_axes = inputs.split(",")
    given64, rounding = given.astype(np.float64), float(jnp.finfo(dtype).eps)
    for_x, for_weight = pull(jnp.asarray(given, found.dtype))
    for gradient, expected in (
        (for_x, np.einsum(f"{result},{weight_axes}->{x_axes}", given64, wide[1])),
        (for_weight, np.einsum(f"{result},{x_axes}->{weight_axes}", given64, wide[0])),
    ):
        assert gradient.dtype == dtype
        atol = (2e-5 if dtype == np.float32 else rounding) * np.abs(expected).max()
        np.testing.assert_allclose(np.asarray(gradient, np.float64), expected, rtol=0, atol=atol)


def test_the_gradient_of_a_weight_makes_no_transposed_copy():
    """In which XLA would compute the hidden state's gradient for one element at a time."""
    batch, length, dim, ffn = 1, 256, 64, 128

    def gradient(x_BTD, weight_FD, dy_BTF):
        def hidden(weight_FD):
            return jax.nn.silu(project_f32("BTD,FD->BTF", x_BTD, weight_FD))

        return jax.vjp(hidden, weight_FD)[1](dy_BTF)

    shapes = ((batch, length, dim), (ffn, dim), (batch, length, ffn))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = jax.jit(gradient).lower(*arrays).compile().as_text()
    assert "dot(" in compiled or "kCustom" in compiled
    assert " copy(" not in compiled and " transpose(" not in compiled
