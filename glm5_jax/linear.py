"""Products with weights, accumulated in float32."""

import functools
import math
import string

import jax
import jax.numpy as jnp

from glm5_jax.bits import as_bits, from_bits
from glm5_jax.collectives import alike, platform

# A CPU widens weights that have more elements by blocks of at most as many.
_WIDENED_AT_ONCE = 2**20


def project(subscripts: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """An einsum of two arrays of one dtype, accumulated in float32 and rounded once, to that dtype.

    bfloat16 accumulation is what made absorbed attention loop on TPU v7x (sglang-jax #1462), and
    XLA's CPU product with a bfloat16 result is about five times slower than with a float32 one.
    """
    return project_f32(subscripts, x, weight).astype(x.dtype)


def project_f32(subscripts: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """`project` with the result left in float32.

    Gradients are rounded to the operands' dtype before they are multiplied in turn: left alone,
    JAX would widen the operands of both backward products to float32.
    """
    return _product(subscripts, *alike(x, weight))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(subscripts: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    if x.dtype == jnp.float32 or not _has_batch_axes(subscripts):
        return _accumulated(subscripts, x, weight)
    return jax.lax.platform_dependent(
        x,
        weight,
        cpu=functools.partial(_widened, subscripts),
        default=functools.partial(_accumulated, subscripts),
    )


def _accumulated(subscripts: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    if platform() == "cpu":
        if (product := _product_of_matrices(subscripts, x, weight)) is not None:
            return product
        if _has_batch_axes(subscripts):
            return _products_in_order(subscripts, x, weight)
    return jnp.einsum(subscripts, x, weight, preferred_element_type=jnp.float32)


def _product_of_matrices(subscripts: str, x: jax.Array, weight: jax.Array) -> jax.Array | None:
    """The einsum as one product of matrices, if what is summed over comes last in both operands.

    Or first in both, as for the gradient of a weight. Of operands with more axes, XLA's CPU backend
    (0.10) would make a transposed copy, and compute there, for one element at a time, what they are
    made of.
    """
    operands, result = subscripts.split("->")
    x_axes, weight_axes = operands.split(",")
    count = (len(x_axes) + len(weight_axes) - len(result)) // 2
    if count == 0:
        return None
    if (x_axes[-count:], result) == (weight_axes[-count:], x_axes[:-count] + weight_axes[:-count]):
        outer, num_summed = x.shape[:-count], math.prod(x.shape[-count:])
        product = _product_by_blocks(x.reshape(-1, num_summed), weight.reshape(-1, num_summed))
        return product.reshape(*outer, *weight.shape[:-count])
    if (x_axes[:count], result) == (weight_axes[:count], x_axes[count:] + weight_axes[count:]):
        num_summed = math.prod(x.shape[:count])
        product = jax.lax.dot_general(
            x.reshape(num_summed, -1),
            weight.reshape(num_summed, -1),
            (((0,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        return product.reshape(*x.shape[count:], *weight.shape[count:])
    return None


def _products_in_order(subscripts: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """The einsum of operands with batch axes, with `x` on the left.

    `jnp.einsum` may multiply the weight by it instead, and XLA's CPU backend (0.10) then makes a
    transposed copy of it.
    """
    operands, result = subscripts.split("->")
    x_axes, weight_axes = operands.split(",")
    shared = [axis for axis in x_axes if axis in weight_axes]
    batch = [axis for axis in shared if axis in result]
    summed = [axis for axis in shared if axis not in result]

    def of_both(axes: list[str]) -> tuple[list[int], list[int]]:
        return [x_axes.index(axis) for axis in axes], [weight_axes.index(axis) for axis in axes]

    product = jax.lax.dot_general(
        x, weight, (of_both(summed), of_both(batch)), preferred_element_type=jnp.float32
    )
    outer = [axis for axis in x_axes + weight_axes if axis not in shared]
    return jnp.transpose(product, [(batch + outer).index(axis) for axis in result])


def _product_by_blocks(x_RD: jax.Array, weight_ED: jax.Array) -> jax.Array:
    """The product RE, of which large bfloat16 weights take part by blocks of rows.

    XLA's CPU backend (0.10) multiplies float32 copies of them. That of a vocabulary takes longer to
    write than to multiply with a token, and a program that needs more than 32 MiB for such copies
    is given fresh pages by the system at every step.
    """
    num_rows, num_summed = weight_ED.shape
    most = max(1, _WIDENED_AT_ONCE // num_summed)
    rows = next(each for each in range(min(most, num_rows), 0, -1) if num_rows % each == 0)

    def product(weight_FD: jax.Array) -> jax.Array:
        return jax.lax.dot_general(
            x_RD, weight_FD, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )

    if weight_ED.dtype == jnp.float32 or rows == num_rows or rows < most / 4:
        return product(weight_ED)
    blocks_NFD = as_bits(weight_ED).reshape(-1, rows, num_summed)
    product_NRF = jax.lax.map(
        lambda block_FD: product(from_bits(block_FD, weight_ED.dtype)), blocks_NFD
    )
    return jnp.moveaxis(product_NRF, 0, 1).reshape(-1, num_rows)


def _widened(subscripts: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """The same sums: XLA's CPU backend (0.10) refuses some batched products of bfloat16."""
    return _accumulated(subscripts, x.astype(jnp.float32), weight.astype(jnp.float32))


def _has_batch_axes(subscripts: str) -> bool:
    operands, result = subscripts.split("->")
    first, second = operands.split(",")
    return bool(set(first) & set(second) & set(result))


def _project_forward(
    subscripts: str, x: jax.Array, weight: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(subscripts, x, weight), (x, weight)


def _project_backward(
    subscripts: str, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, weight = saved
    operands, result = subscripts.split("->")
    x_axes, weight_axes = operands.split(",")
    gradient = gradient.astype(x.dtype)
    return (
        project(f"{result},{weight_axes}->{x_axes}", gradient, weight),
        project(f"{result},{x_axes}->{weight_axes}", gradient, x),
    )


_product.defvjp(_project_forward, _project_backward)


def sum_of_product(x: jax.Array, y: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """`jnp.sum(x * y, axes)` of float32 arrays.

    For XLA's CPU backend (0.10) an einsum, which takes down to a hundredth of the time. Other
    backends would round the operands of one.
    """
    if platform() != "cpu":
        return jnp.sum(x * y, axes)
    letters = string.ascii_lowercase[: x.ndim]
    kept = "".join(letter for axis, letter in enumerate(letters) if axis not in axes)
    return jnp.einsum(f"{letters},{letters}->{kept}", x, y)


def product_f32(subscripts: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """An einsum computed wholly in float32, also where hardware would rather round its operands.

    For the router and the indexer, whose results are compared and not only added: there the
    rounding of an operand changes which experts and tokens are chosen.
    """
    return jnp.einsum(
        subscripts,
        x.astype(jnp.float32),
        weight.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
