import functools

import jax
import jax.numpy as jnp
import pytest

from glm5_jax.cache import KVCache
from glm5_jax.model import Glm5, forward, logits, predict_ahead
from glm5_jax.params import abstract, count_params, leaves_by_path
from glm5_jax.places import Places
from glm5_jax.presets import PRESETS, load_preset

BATCH, LENGTH, CONTEXT = 2, 4096, 32768


def tokens(length):
    return jax.ShapeDtypeStruct((BATCH, length), jnp.int32)


@functools.cache
def blueprint(name):
    return Glm5(load_preset(name).config)


@pytest.mark.parametrize(
    ("name", "with_mtp", "without_mtp"),
    [
        ("glm-5", 753_864_139_008, 743_911_199_232 + 75 * 256),
        ("glm-5.1", 753_864_139_008, 743_911_199_232 + 75 * 256),
        ("glm-5.2", 753_329_921_024 + 76 * 256, 743_377_000_704 + 75 * 256),
        ("glm-5.3", 753_329_921_024 + 76 * 256, 743_377_000_704 + 75 * 256),
    ],
)
def test_parameters_are_counted_exactly(name, with_mtp, without_mtp):
    """The published counts leave out the router biases, 256 per MoE layer."""
    model = blueprint(name)
    assert count_params(model) == with_mtp
    assert with_mtp - count_params(model.mtp) == without_mtp


def test_parts_of_glm5_are_counted_exactly():
    leaves = leaves_by_path(blueprint("glm-5"))

    def count(*words):
        return sum(
            spec.size
            for path, spec in leaves.items()
            if not path.startswith("mtp") and any(word in path for word in words)
        )

    assert count("embedding") == count("head.", "head") - count("head_gate") == 951_582_720
    assert count(".experts.") == 724_775_731_200
    assert count(".shared.") == 2_831_155_200
    assert count("router.weight") == 117_964_800
    assert count(".indexer.") == 731_008_512
    assert count("q_down", "q_up", "kv_down", "kv_up", ".out") == 12_871_532_544
    assert count("q_norm", "kv_norm") == 199_680


@pytest.mark.parametrize("name", PRESETS)
def test_forward_pass_traces(name):
    model = abstract(blueprint(name), jnp.bfloat16)

    def run(model, tokens):
        places = Places.unpadded(*tokens.shape)
        hidden = forward(model, tokens, places).hidden_BTD
        ahead = predict_ahead(model, hidden, tokens, places, depth=3)
        return [logits(model, h) for h in (hidden, *(h for h, _ in ahead))]

    for out in jax.eval_shape(run, model, tokens(LENGTH)):
        assert out.shape == (BATCH, LENGTH, model.config.vocab_size)


@pytest.mark.parametrize("name", PRESETS)
def test_gradient_traces(name):
    model = abstract(blueprint(name), jnp.bfloat16)

    def loss(model, tokens):
        places = Places.unpadded(*tokens.shape)
        hidden = forward(model, tokens, places, remat="layers").hidden_BTD
        ahead = predict_ahead(model, hidden, tokens, places, depth=1)
        return jnp.mean(logits(model, hidden)) + jnp.mean(logits(model, ahead[0][0]))

    gradient = jax.eval_shape(jax.grad(loss), model, tokens(LENGTH))
    assert jax.tree.leaves(gradient) == jax.tree.leaves(model)


@pytest.mark.parametrize("name", PRESETS)
def test_decoding_traces_and_returns_a_cache_of_the_same_shape(name):
    model = abstract(blueprint(name), jnp.bfloat16)
    cache = jax.eval_shape(lambda: KVCache.create(model.config, BATCH, CONTEXT, jnp.bfloat16))

    def step(model, cache, tokens):
        count = jnp.ones(BATCH, jnp.int32)
        return forward(model, tokens, cache.next_places(count, 1), cache).cache

    after = jax.eval_shape(step, model, cache, tokens(1))
    assert jax.tree.structure(after) == jax.tree.structure(cache)
    assert jax.tree.leaves(after) == jax.tree.leaves(cache)


@pytest.mark.parametrize(("name", "bytes_per_token"), [("glm-5", 109_824), ("glm-5.2", 95_232)])
def test_the_cache_takes_what_the_published_sizes_say(name, bytes_per_token):
    config = load_preset(name).config
    cache = jax.eval_shape(lambda: KVCache.create(config, 1, 1024, jnp.bfloat16))
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.pools))
    assert total == 1024 * bytes_per_token
