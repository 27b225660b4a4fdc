"""Counting the products and the memory traffic of one device."""

import functools

import jax
import jax.numpy as jnp
import pytest

from glm5_jax.plan.tally import Collective, Costs
from tests.costs.counting import BOTH, F32, ONE, P, costs_of, sharded, spec


def test_a_scanned_product_counts_as_often_as_it_runs(mesh):
    def repeat(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=7)[0]

    function = sharded(mesh, repeat, (P("data"), P()), P("data"))
    x, w = spec(mesh, (16, 32), P("data"), jnp.bfloat16), spec(mesh, (32, 32), P(), jnp.bfloat16)
    costs = costs_of(function, x, w)
    assert costs.flops == {"bfloat16": 7 * 2 * (16 // 2) * 32 * 32}
    assert costs.hbm_bytes == 7 * 2 * (8 * 32 + 32 * 32 + 8 * 32)
    assert costs.collectives == {}


def test_products_count_by_the_wider_dtype_and_its_precision():
    def mixed(a, b):
        first = jax.lax.dot(a, b, preferred_element_type=jnp.float32)
        return jnp.matmul(first, first, precision=jax.lax.Precision.HIGHEST), first @ first

    a, b = jnp.zeros((8, 4), jnp.float8_e4m3fn), jnp.zeros((4, 8), jnp.bfloat16)
    flops = 2 * 8 * 8 * 8
    expected = {"bfloat16": flops / 2, "float32_highest": flops, "float32": flops}
    assert costs_of(mixed, a, b).flops == expected


def test_batched_ragged_and_convolved_products_count_each_multiply_and_add():
    batched = costs_of(
        lambda x, w: jnp.einsum("BTD,BDF->BTF", x, w), jnp.ones((3, 5, 7)), jnp.ones((3, 7, 11))
    )
    assert batched.flops == {"float32": 2 * 3 * 5 * 7 * 11}
    sizes = jnp.array([2, 3], jnp.int32)
    rows, groups = jnp.ones((5, 7)), jnp.ones((2, 7, 11))
    ragged = functools.partial(jax.lax.ragged_dot, group_sizes=sizes)
    assert costs_of(ragged, rows, groups).flops == {"float32": 2 * 5 * 7 * 11}

    def gradient(rows, groups):
        return jax.vjp(ragged, rows, groups)[1](jnp.ones((5, 11)))

    assert costs_of(gradient, rows, groups).flops == {"float32": 3 * 2 * 5 * 7 * 11}
    image, kernel = jnp.ones((1, 3, 8, 8)), jnp.ones((6, 3, 3, 3))
    convolved = costs_of(lambda x, w: jax.lax.conv(x, w, (1, 1), "SAME"), image, kernel)
    assert convolved.flops == {"float32": 2 * (6 * 8 * 8) * (3 * 3 * 3)}


def test_a_gradient_through_remat_counts_the_recomputation(mesh):
    layers, rows, dim = 3, 8, 16
    forward = 2 * 2 * rows * dim * dim

    def loss(w, x, *, remat):
        def layer(x, w):
            whole = jax.lax.all_gather(w, "model", axis=1, tiled=True)
            return jnp.tanh(jnp.tanh(x @ whole[0]) @ whole[1]), None

        y = jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, w)[0]
        return jax.lax.psum(y.sum(), BOTH)

    w = spec(mesh, (layers, 2, dim, dim), P(None, None, "model"))
    x = spec(mesh, (8 * rows, dim), P(BOTH))

    def counted(remat):
        function = functools.partial(loss, remat=remat)
        in_specs = P(None, None, "model"), P(BOTH)
        mapped = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=P())
        return costs_of(jax.value_and_grad(mapped), w, x)

    plain, remat = counted(False), counted(True)
    assert plain.flops == {"float32": layers * 3 * forward}
    assert remat.flops == {"float32": layers * 4 * forward}
    assert plain.by_axes[("all-gather", ONE)].count == layers
    assert remat.by_axes[("all-gather", ONE)].count == 2 * layers
    assert remat.by_axes[("reduce-scatter", ONE)].count == layers


def blocks(x, num_used):
    with jax.named_scope("expert_blocks"):
        return jax.lax.fori_loop(0, num_used, lambda _, x: x @ x, x)


def test_a_loop_over_data_runs_as_often_as_its_scope_says():
    x, used = jnp.ones((8, 8)), jnp.int32(3)
    costs = costs_of(blocks, x, used, loop_trips={"expert_blocks": 2.5, "other": 9})
    assert costs.flops == {"float32": 2.5 * 2 * 8**3}


def test_a_custom_gradient_keeps_the_scope_of_its_loops():
    @jax.custom_vjp
    def function(x, used):
        return blocks(x, used)

    def backward(saved, dy):
        return blocks(saved[0], saved[1]) @ dy, None

    function.defvjp(lambda x, used: (function(x, used), (x, used)), backward)

    def loss(x, used):
        def layer(x, _):
            return function(x, used), None

        return jax.lax.scan(jax.checkpoint(layer), x, None, length=2)[0].sum()

    costs = costs_of(
        jax.value_and_grad(loss), jnp.ones((8, 8)), jnp.int32(3), loop_trips={"expert_blocks": 5}
    )
    assert costs.flops == {"float32": 2 * (5 + 5 + 1) * 2 * 8**3}


@pytest.mark.parametrize("loop_trips", [{}, {"other": 2}, {"expert": 2, "blocks": 2}])
def test_a_loop_without_one_length_is_refused(loop_trips):
    with pytest.raises(ValueError, match="a while loop in scope 'expert_blocks'"):
        costs_of(blocks, jnp.ones((8, 8)), jnp.int32(3), loop_trips=loop_trips)


def test_only_the_platform_s_branch_counts():
    def function(x):
        return jax.lax.platform_dependent(
            x, cpu=lambda x: x @ x @ x @ x, tpu=lambda x: x @ x @ x, default=lambda x: x @ x
        )

    products = {"cpu": 3, "tpu": 2, "cuda": 1}
    for platform, number in products.items():
        flops = costs_of(function, jnp.ones((8, 8)), platform=platform).flops
        assert flops == {"float32": number * 2 * 8**3}


def test_of_other_branches_the_most_expensive_counts():
    def function(choice, x):
        return jax.lax.switch(choice, [lambda x: x, lambda x: x @ x @ x, lambda x: x @ x], x)

    assert costs_of(function, jnp.int32(0), jnp.ones((8, 8))).flops == {"float32": 2 * 2 * 8**3}


def test_a_kernel_of_unknown_cost_is_refused():
    from jax.experimental import pallas as pl

    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...] * 2

    double = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((8, 8), jnp.float32))
    with pytest.raises(ValueError, match="pallas_call is not known"):
        costs_of(double, jnp.ones((8, 8)))


def test_what_is_gathered_scattered_and_sorted_is_memory_traffic(mesh):
    def function(x, index):
        taken = x[index]  # 3 rows of 8
        x = x.at[index].add(taken)
        x = jax.lax.dynamic_update_slice(x, x[:2], (0, 0))
        return jnp.cumsum(x, axis=0), jax.lax.top_k(x, 2)

    mapped = sharded(mesh, function, (P(), P()), P())
    x, index = spec(mesh, (16, 8)), spec(mesh, (3,), P(), jnp.int32)
    values = 2 * 3 * 8 + 2 * 3 * 8 + 2 * 2 * 8 + 2 * 16 * 8 + 16 * 8 + 2 * 16 * 2
    assert costs_of(mapped, x, index).hbm_bytes == F32 * values


def test_outside_of_a_shard_map_each_device_has_its_part(mesh):
    """Elementwise work is one pass: it reads weight, gradient and momentum, and writes two."""

    def update(w, m, x):
        loss = jax.shard_map(
            lambda w, x: jax.lax.psum((w * x).sum(), BOTH),
            mesh=mesh,
            in_specs=P(BOTH),
            out_specs=P(),
        )
        g = jax.grad(loss)(w, x)
        m = jnp.where(g > 0, 0.9 * m + g, m)
        return w - 0.1 * jnp.clip(m, -1, 1), m

    w = spec(mesh, (64, 8), P(BOTH))
    costs = costs_of(update, w, w, spec(mesh, (64, 8), P(BOTH)))
    part = 64 * 8 * F32 / 8
    # The scalars on the way from the loss to its gradient are the rest.
    assert 5 * part <= costs.hbm_bytes <= 5 * part + 8 * F32


def test_costs_add_up_and_repeat():
    one = Costs({"bfloat16": 2}, 3, {("all-reduce", ONE): Collective(1, 8)})
    other = Costs({"float32": 1}, 1, {("all-reduce", BOTH): Collective(2, 4)})
    both = one + other.times(2)
    assert both.flops == {"bfloat16": 2, "float32": 2}
    assert both.hbm_bytes == 5
    assert both.collectives == {"all-reduce": Collective(5, 16)}
