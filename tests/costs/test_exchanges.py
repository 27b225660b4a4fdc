"""Counting what the devices of a mesh send each other."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import pytest

from glm5_jax.plan.costs import count
from glm5_jax.plan.tally import Collective
from tests.costs.counting import BOTH, F32, ONE, P, costs_of, sharded, spec

HELD = 64 * 8 * F32  # bytes of a device's operand


@pytest.mark.parametrize(("axes", "n"), [(ONE, 4), (BOTH, 8), (("data",), 2)])
@pytest.mark.parametrize(
    ("kind", "function", "sent"),
    [
        ("all-gather", functools.partial(jax.lax.all_gather, tiled=True), lambda n: n - 1),
        ("all-reduce", jax.lax.psum, lambda n: 2 * (n - 1) / n),
        ("all-reduce", jax.lax.pmax, lambda n: 2 * (n - 1) / n),
        ("all-reduce", jax.lax.pmin, lambda n: 2 * (n - 1) / n),
        (
            "reduce-scatter",
            functools.partial(jax.lax.psum_scatter, tiled=True),
            lambda n: (n - 1) / n,
        ),
        (
            "all-to-all",
            functools.partial(jax.lax.all_to_all, split_axis=0, concat_axis=0, tiled=True),
            lambda n: (n - 1) / n,
        ),
    ],
)
def test_a_device_sends_what_a_ring_sends(mesh, kind, function, sent, axes, n):
    once = sharded(mesh, lambda x: function(x, axes).sum(), (P(),), P())
    costs = costs_of(once, spec(mesh, (64, 8)))
    assert costs.by_axes == {(kind, axes): Collective(1, HELD * sent(n))}
    assert costs.collectives == {kind: Collective(1, HELD * sent(n))}


def test_a_permutation_sends_all_and_a_ragged_exchange_at_most_its_share(mesh):
    around = [(0, 1), (1, 2), (2, 3), (3, 0)]

    def both(x):
        x = jax.lax.ppermute(x, "model", around)
        index = jnp.arange(4, dtype=jnp.int32)
        one = jnp.ones(4, jnp.int32)
        exchange = jax.lax.ragged_all_to_all
        return exchange(x, jnp.zeros_like(x), index, one, index, one, axis_name="model").sum()

    costs = costs_of(sharded(mesh, both, (P(),), P()), spec(mesh, (64, 8)))
    assert costs.collectives == {
        "collective-permute": Collective(1, HELD),
        "ragged-all-to-all": Collective(1, HELD * 3 / 4),
    }


def test_kinds_add_up_over_their_axes_and_over_loops(mesh):
    def reduce(x):
        def step(x, _):
            return jax.lax.psum(jax.lax.psum(x, "data"), "model"), None

        return jax.lax.scan(step, x, None, length=5)[0]

    costs = costs_of(sharded(mesh, reduce, (P(),), P()), spec(mesh, (64, 8)))
    assert costs.by_axes == {
        ("all-reduce", ("data",)): Collective(5, 5 * HELD),
        ("all-reduce", ("model",)): Collective(5, 5 * HELD * 1.5),
    }
    assert costs.collectives == {"all-reduce": Collective(10, 12.5 * HELD)}


def test_an_axis_of_one_device_exchanges_nothing(mesh):
    function = sharded(mesh, lambda x: jax.lax.psum(x, "model"), (P(),), P())
    jaxpr = jax.jit(function).trace(spec(mesh, (64, 8))).jaxpr
    alone = count(jaxpr, {"data": 2, "model": 1}, loop_trips={}, platform="cpu")
    assert alone.by_axes == {}
    with pytest.raises(ValueError, match="'model' has no size"):
        count(jaxpr, {"data": 2}, loop_trips={}, platform="cpu")


def test_checked_collectives_count_like_unchecked_ones(mesh):
    """With types that say over which axes a value varies, primitives have other names."""

    def everything(x):
        x = jax.lax.all_gather(x, "model", tiled=True)
        x = jax.lax.psum_scatter(x, "model", tiled=True)
        return jax.lax.psum(x.sum(), BOTH)

    x = spec(mesh, (64, 8), P(BOTH))
    unchecked = sharded(mesh, everything, P(BOTH), P())
    checked = jax.shard_map(everything, mesh=mesh, in_specs=P(BOTH), out_specs=P())
    assert costs_of(checked, x) == costs_of(unchecked, x)


def test_the_exchanges_that_shardings_imply_are_counted(mesh):
    def function(x, w):
        norm = jnp.sum(x * x)
        rows = jax.NamedSharding(mesh, P("data"))
        return norm, jnp.matmul(x, w, out_sharding=rows), jax.reshard(x, rows)

    x, w = spec(mesh, (16, 32), P("data", "model")), spec(mesh, (32, 4), P("model"))
    costs = costs_of(function, x, w)
    assert costs.flops == {"float32": 2 * 8 * 8 * 4}
    assert costs.by_axes == {
        ("all-reduce", BOTH): Collective(1, 2 * F32 * 7 / 8),
        ("all-reduce", ONE): Collective(1, 2 * 8 * 4 * F32 * 3 / 4),
        ("all-gather", ONE): Collective(1, 8 * 8 * F32 * 3),
    }


def test_a_compiled_program_holds_the_collectives_counted(mesh):
    """Layers unrolled by hand, each with other widths: XLA then neither loops nor combines."""

    def function(x):
        for layer in range(3):
            x = jnp.tanh(jax.lax.all_gather(x, "model", tiled=True))
            x = jnp.sin(jax.lax.psum_scatter(x, "model", tiled=True))
            if layer < 2:
                x = jnp.cos(jax.lax.all_to_all(x, "data", 0, 1, tiled=True))
        x = jnp.exp(jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]))
        return jax.lax.pmax(jax.lax.psum(x, BOTH) ** 2, "model")

    mapped = jax.jit(sharded(mesh, function, P(BOTH), P()))
    x = spec(mesh, (64, 8), P(BOTH))
    text = mapped.lower(x).compile().as_text()
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    compiled = collections.Counter(re.findall(rf" ({kinds})(?:-start)?\(", text))
    counted = {kind: part.count for kind, part in costs_of(mapped, x).collectives.items()}
    assert counted == compiled
