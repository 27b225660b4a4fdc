"""Bringing tokens to experts that are divided over devices, by both ways."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from glm5_jax import exchange
from glm5_jax.collectives import BATCH, DATA, EXPERT, MESH_AXES, gathered, num_shards, shard_index
from glm5_jax.experts import ExpertList, Experts
from glm5_jax.mesh import make_mesh, put
from glm5_jax.params import initialize
from glm5_jax.sharding import DECODE, TRAIN, Partition
from tests.tiny import TINY, tiny_config

CONFIG = tiny_config(TINY)
E, D = CONFIG.moe.num_experts, CONFIG.dim
BLUEPRINT = Experts(CONFIG)
TOKENS = 40  # five of each device where all share the batch


def emulated_ragged(x, received, offset_N, size_N, lands_N, received_N, axes):
    """The documented meaning of jax.lax.ragged_all_to_all, which CPUs do not have."""
    every_NRX = gathered(x[None], axes, 0)
    offsets_NN, sizes_NN, lands_NN = (
        gathered(each[None], axes, 0) for each in (offset_N, size_N, lands_N)
    )
    me = shard_index(axes)
    row_M = jnp.arange(received.shape[0])
    for origin in range(num_shards(axes)):
        place_M = row_M - lands_NN[origin, me]
        lands_M = (place_M >= 0) & (place_M < sizes_NN[origin, me])
        sent = every_NRX[origin].at[place_M + offsets_NN[origin, me]].get(mode="clip")
        received = jnp.where(lands_M.reshape(-1, *[1] * (x.ndim - 1)), sent, received)
    return received


@pytest.fixture(params=["all", "chosen"])
def way(request, monkeypatch):
    """Both ways, whatever the backend and the number of devices."""
    if request.param == "chosen":
        monkeypatch.setattr(exchange, "ragged", emulated_ragged)
        monkeypatch.setattr(
            exchange, "_bring", lambda own, num, axes: exchange.bring_chosen(own, num, axes)
        )
        monkeypatch.setattr(exchange, "_take_back", exchange.take_back_chosen)
    return request.param


def choices(kind):
    rng = np.random.default_rng(0)
    if kind == "even":
        chosen = np.argsort(rng.random((TOKENS, E)), axis=1)[:, :2]
    elif kind == "uneven":  # most choose expert 3, some experts have no token
        chosen = np.where(rng.random((TOKENS, 2)) < 0.7, [3, 4], [0, 6])
    else:  # all tokens choose one device's experts, which are two experts or one
        chosen = np.tile([6, 7], (TOKENS, 1))
    return jnp.asarray(chosen.reshape(8, TOKENS // 8, 2), jnp.int32)


def values_and_gradients(experts, x, chosen, gates, weights, axes=()):
    def weighted(experts, x, gates):
        apply = functools.partial(exchange.apply_experts, num_experts=E, axes=axes)
        y, _ = apply(ExpertList.of(experts), x, chosen, gates)
        return jnp.sum(y * weights), y

    gradient = jax.grad(weighted, argnums=(0, 1, 2), has_aux=True)
    return gradient(experts, x, gates)


# Shapes of meshes, by name, and whose rules they have.
MESHES = {
    "8": ((1, 8, 1), DECODE),
    "2x4": ((2, 4, 1), DECODE),
    "4 with replicas": ((2, 4, 1), TRAIN),
    "4 of 8": ((1, 4, 2), DECODE),
}


@functools.cache
def on_one_device(way):
    return jax.jit(functools.partial(values_and_gradients, axes=()))


@functools.cache
def on_mesh(way, name):
    """A partition, and what devices compute together on it; traced in that way."""
    shape, rules = MESHES[name]
    rules = rules._replace(axes={**rules.axes, "embed": (), "ffn": ()}, stored=frozenset())
    part = Partition(make_mesh(dict(zip(MESH_AXES, shape, strict=True))), rules)
    axes = rules.axes["experts"]
    assert axes in (BATCH, (EXPERT,)) and (DATA in axes) == (rules.axes["experts"] == BATCH)
    specs, rows = part.specs(BLUEPRINT), P(BATCH)
    compute = part.on_shards(
        functools.partial(values_and_gradients, axes=axes),
        (specs, rows, rows, rows, rows),
        ((specs, rows, rows), rows),
    )
    return part, jax.jit(compute)


@pytest.mark.parametrize("kind", ["even", "uneven", "all on one device"])
@pytest.mark.parametrize("name", MESHES)
def test_outputs_and_gradients_are_those_of_one_device(way, name, kind):
    keys = jax.random.split(jax.random.key(0), 4)
    experts = initialize(BLUEPRINT, keys[0], std=0.2)
    chosen = choices(kind)
    x, weights = (jax.random.normal(key, (*chosen.shape[:2], D)) for key in keys[1:3])
    gates = jax.random.normal(keys[3], chosen.shape)
    expected = on_one_device(way)(experts, x, chosen, gates, weights)

    part, compute = on_mesh(way, name)
    actual = compute(
        part.place(experts, BLUEPRINT),
        *(put(np.asarray(each), part.mesh, P(BATCH)) for each in (x, chosen, gates, weights)),
    )
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(np.max(np.abs(b))))
