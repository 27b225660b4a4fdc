"""The model on eight devices against the same model on one, over meshes of every kind."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from glm5_jax.cache import KVCache
from glm5_jax.collectives import BATCH, MESH_AXES, MODEL, total
from glm5_jax.inference.generate import Generator
from glm5_jax.inference.request import Sampling
from glm5_jax.mesh import make_mesh, put
from glm5_jax.model import Glm5, for_decoding, forward, logits, predict_ahead
from glm5_jax.params import abstract, leaf_dtype, leaves_by_path
from glm5_jax.places import Places
from glm5_jax.sharding import DECODE, TRAIN, Partition
from tests.tiny import SHARED, random_model, tiny_config
from train.loss import Objective, loss

# Sizes that eight devices divide, along any axis of the mesh.
RAW = SHARED | {"vocab_size": 104, "num_attention_heads": 8, "num_key_value_heads": 8}
CONFIG = tiny_config(RAW)
BLUEPRINT = Glm5(CONFIG)
OBJECTIVE = Objective(mtp_depth=2, mtp_weight=0.3, index_weight=1.0)
TOKENS = np.random.default_rng(0).integers(2, 95, (8, 22)).astype(np.int32)
# Whole rows, packed rows and padding, unevenly over the shards; 22 divides into no equal parts.
SEGMENTS = np.ones_like(TOKENS)
SEGMENTS[1, 5:], SEGMENTS[2, 20:], SEGMENTS[3, :4], SEGMENTS[7] = 2, 0, 0, 0

MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (4, 2, 1), (1, 2, 4)]
on_every_mesh = pytest.mark.parametrize("shape", MESHES, ids=lambda s: "x".join(map(str, s)))


def partition(shape, rules):
    return Partition(make_mesh(dict(zip(MESH_AXES, shape, strict=True))), rules)


@functools.cache
def model():
    return random_model(RAW)


def predict(model, tokens, segments, rules=DECODE):
    places = Places.packed(segments)
    output = forward(model, tokens, places, rules=rules)
    ahead = predict_ahead(model, output.hidden_BTD, tokens, places, 2, rules=rules)
    hidden = [output.hidden_BTD, *(hidden for hidden, _ in ahead)]
    loads = [load for segment in output.observed for load in segment if load is not None]
    return [logits(model, each, rules) for each in hidden], total(loads, BATCH)


def learn(model, tokens, segments, rules=DECODE):
    def minimised(model):
        return loss(model, tokens, Places.packed(segments), OBJECTIVE, rules=rules, remat="layers")

    return jax.value_and_grad(minimised, has_aux=True)(model)


@functools.cache
def on_one_device(function):
    return jax.jit(function)(model(), TOKENS, SEGMENTS)


def on_mesh(function, shape, rules, out_specs):
    part = partition(shape, rules)
    specs = part.specs(BLUEPRINT)
    inner = part.on_shards(
        functools.partial(function, rules=rules), (specs, P(BATCH), P(BATCH)), out_specs
    )
    rows = (put(each, part.mesh, P(BATCH)) for each in (TOKENS, SEGMENTS))
    return jax.jit(inner)(part.place(model(), BLUEPRINT), *rows)


def assert_equal(actual, expected):
    """To 1e-5 of the size of the largest value."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(np.max(np.abs(b))) + 1e-12)


@on_every_mesh
def test_logits_and_loads_are_those_of_one_device(shape):
    scores, loads = on_mesh(predict, shape, DECODE, ([P(BATCH, None, MODEL)] * 3, P()))
    expected_scores, expected_loads = on_one_device(predict)
    real = SEGMENTS > 0
    assert_equal([s[real] for s in map(np.asarray, scores)], [s[real] for s in expected_scores])
    assert min(int(load.sum()) for load in expected_loads) == real.sum() * 2
    for a, b in zip(loads, expected_loads, strict=True):
        np.testing.assert_array_equal(a, b)


@on_every_mesh
def test_losses_and_gradients_are_those_of_one_device(shape):
    specs = partition(shape, TRAIN).specs(BLUEPRINT)
    (value, (losses, loads)), gradient = on_mesh(learn, shape, TRAIN, ((P(), P()), specs))
    (one_value, (one_losses, one_loads)), one_gradient = on_one_device(learn)
    assert_equal((value, losses), (one_value, one_losses))
    jax.tree.map(np.testing.assert_array_equal, loads, one_loads)
    for path, leaf in leaves_by_path(gradient).items():
        expected = leaves_by_path(one_gradient)[path]
        assert float(np.max(np.abs(expected))) > 0 or path.endswith("router.bias"), path
        assert_equal(leaf, expected)


@pytest.mark.parametrize("shape", [(1, 2, 4), (1, 1, 8)])
def test_long_sequences_are_cut_into_blocks_on_meshes_too(shape, monkeypatch):
    """As long ones are: a few queries at a time, each device having its share of some things."""
    monkeypatch.setattr("glm5_jax.queries.BLOCK_BYTES", 2**14)
    specs = partition(shape, TRAIN).specs(BLUEPRINT)
    (value, (losses, _)), gradient = on_mesh(learn, shape, TRAIN, ((P(), P()), specs))
    (one_value, (one_losses, _)), one_gradient = on_one_device(learn)
    assert_equal((value, losses, gradient), (one_value, one_losses, one_gradient))


PROMPTS = [TOKENS[row, : 22 - 3 * row].tolist() for row in range(5)]


@functools.cache
def one_device_text(temperature):
    return Generator(model()).complete(PROMPTS, 12, Sampling(temperature=temperature, seed=3))


@on_every_mesh
def test_greedy_and_sampled_text_are_those_of_one_device(shape):
    """Contexts of up to 34 tokens, 8 of which are attended to, in up to 8 shards; drafted there."""
    generator = Generator(model(), partition(shape, DECODE), draft_tokens=2)
    for temperature in (0.0, 1.0):
        text = generator.complete(PROMPTS, 12, Sampling(temperature=temperature, seed=3))
        assert text == one_device_text(temperature)


@pytest.mark.parametrize("shape", [(2, 1, 4), (1, 1, 8)])
def test_text_is_the_same_where_every_device_gathers_what_it_holds(shape, monkeypatch):
    """A block has 4 or 2 tokens, and one device may hold all 8 that are selected."""
    monkeypatch.setattr("glm5_jax.attention.GATHER_COST", 0)
    monkeypatch.setattr("glm5_jax.held._SMALLEST_BLOCK", 1)
    generator = Generator(model(), partition(shape, DECODE), draft_tokens=1)
    monkeypatch.setattr("glm5_jax.attention.latent_attention", None)  # none attends to all
    text = generator.complete(PROMPTS, 12, Sampling(temperature=0.0, seed=3))
    assert text == one_device_text(0.0)


def decode_step(shape, capacity, batch=8):
    """The compiled step that reads one token per row, and the sizes of its arguments."""
    part = partition(shape, DECODE)

    def step(model, cache, token_B1):
        places = cache.next_places(jnp.ones(token_B1.shape[0], jnp.int32), 1)
        output = forward(model, token_B1, places, cache)
        return logits(model, output.hidden_BTD), output.cache

    weights = for_decoding(abstract(BLUEPRINT, sharding=part.sharding))
    specs = KVCache.specs(CONFIG, jnp.float32)
    cache = jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=jax.NamedSharding(part.mesh, spec)
        ),
        jax.eval_shape(lambda: KVCache.create(CONFIG, batch, capacity, jnp.float32)),
        specs,
    )
    rows = jax.NamedSharding(part.mesh, P(BATCH))
    token = jax.ShapeDtypeStruct((batch, 1), jnp.int32, sharding=rows)
    inner = part.on_shards(
        step, (part.specs(BLUEPRINT), specs, P(BATCH)), (P(BATCH, None, MODEL), specs)
    )
    compiled = jax.jit(inner, donate_argnums=1).lower(weights, cache, token).compile()
    return compiled, weights, cache


def collectives(hlo):
    """The kind and the number of elements of every collective's result."""
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    for line in hlo.splitlines():
        found = re.search(rf"= (.*?) ({kinds})(-start)?\(", line)
        if found:
            shapes = re.findall(r"\[([\d,]*)\]", found[1])
            yield found[2], max(int(np.prod([int(n) for n in s.split(",") if n])) for s in shapes)


@on_every_mesh
def test_decoding_moves_neither_experts_nor_the_cache(shape):
    compiled, weights, cache = decode_step(shape, capacity=1024)
    one_layer = CONFIG.moe.num_experts * CONFIG.moe.ffn * CONFIG.dim
    moved = list(collectives(compiled.as_text()))
    assert moved
    # The largest is a row of queries or candidates; a layer's experts or slots are far larger.
    largest = max(size for _, size in moved)
    assert largest < one_layer / 2
    assert largest < cache.pools.segments[0][0].rows_LYUA.size / CONFIG.num_layers / 8 / 2


def test_training_gathers_one_layer_at_a_time():
    """And of its experts only those that this device computes."""
    part = partition((2, 2, 2), TRAIN)
    specs, rows = part.specs(BLUEPRINT), P(BATCH)
    inner = part.on_shards(
        functools.partial(learn, rules=TRAIN), (specs, rows, rows), ((P(), P()), specs)
    )
    tokens = jax.ShapeDtypeStruct((8, 22), jnp.int32, sharding=jax.NamedSharding(part.mesh, rows))
    weights = abstract(BLUEPRINT, sharding=part.sharding)
    hlo = jax.jit(inner).lower(weights, tokens, tokens).compile().as_text()
    gathered = [size for kind, size in collectives(hlo) if kind == "all-gather"]
    one_expert = CONFIG.moe.ffn * CONFIG.dim // part.mesh.shape[MODEL]
    experts_here = CONFIG.moe.num_experts // part.mesh.shape["expert"]
    joint = 2 * CONFIG.dim**2  # of the MTP layer
    assert experts_here * one_expert in gathered
    assert max(gathered) == max(experts_here * one_expert, joint)


@on_every_mesh
@pytest.mark.parametrize("rules", [DECODE, TRAIN], ids=["decode", "train"])
def test_devices_hold_equal_shares_of_what_the_rules_divide(shape, rules):
    part = partition(shape, rules)
    weights = part.place(model(), BLUEPRINT)
    shares = dict.fromkeys(part.mesh.devices.flat, 0)
    divided = 0
    for path, leaf in leaves_by_path(weights).items():
        spec = leaves_by_path(BLUEPRINT)[path]
        assert leaf.dtype == leaf_dtype(spec, jnp.float32)
        for shard in leaf.addressable_shards:
            shares[shard.device] += shard.data.nbytes
        axes = [axis for axes in rules.divisors(spec) for axis in axes]
        expected = leaf.nbytes // np.prod([part.mesh.shape[axis] for axis in axes], dtype=int)
        assert leaf.addressable_shards[0].data.nbytes == expected, path
        divided += len(axes) > 0
    assert len(set(shares.values())) == 1 and divided > 20


def test_arguments_of_a_compiled_step_are_the_shards():
    compiled, weights, cache = decode_step((2, 2, 2), capacity=1024)
    expected = 8 // 4 * 4  # tokens
    used = [leaf for path, leaf in leaves_by_path(weights).items() if not path.startswith("mtp.")]
    for leaf in [*used, *jax.tree.leaves(cache)]:
        local = leaf.sharding.shard_shape(leaf.shape)
        expected += int(np.prod(local)) * leaf.dtype.itemsize
    actual = compiled.memory_analysis().argument_size_in_bytes
    assert abs(actual - expected) <= 0.02 * expected
