import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.cache import KVCache, Pools
from glm5_jax.model import Glm5, for_decoding, forward, logits, predict_ahead, read_ahead
from glm5_jax.params import abstract
from glm5_jax.places import Places
from glm5_jax.presets import load_preset
from tests.reference.numpy_glm5 import NumpyGlm5
from tests.tiny import GROUPED, TINY, TOKENS, build_model, random_model, random_weights


@jax.jit
def predictions(model, tokens, places):
    hidden = forward(model, tokens, places).hidden_BTD
    ahead = predict_ahead(model, hidden, tokens, places, depth=3)
    return [logits(model, hidden) for hidden, _ in ahead]


@pytest.mark.parametrize("raw", [TINY, GROUPED], ids=["full", "grouped"])
def test_every_depth_predicts_what_the_reference_does(raw):
    weights = random_weights(raw)
    expected = NumpyGlm5(weights, raw).mtp_logits(TOKENS, depth=3)
    tokens = jnp.array([TOKENS])
    actual = predictions(build_model(raw, weights), tokens, Places.unpadded(*tokens.shape))
    for depth, (ours, theirs) in enumerate(zip(actual, expected, strict=True), start=1):
        np.testing.assert_allclose(ours[0, : len(TOKENS) - depth], theirs, atol=1e-4)


def test_the_joined_input_has_the_embedding_first_and_the_hidden_state_second():
    tokens = jnp.array([TOKENS])
    places = Places.unpadded(*tokens.shape)
    dim = TINY["hidden_size"]
    other_tokens = (tokens + 1) % 97
    model = random_model()
    hidden = jax.random.normal(jax.random.key(0), (1, len(TOKENS), dim))
    other_hidden = jax.random.normal(jax.random.key(1), hidden.shape)

    def predict(hidden, tokens):
        return predict_ahead(model, hidden, tokens, places, depth=1)[0][0][:, :-1]

    whole = model.mtp.join
    model.mtp.join = whole.at[:, dim:].set(0)
    np.testing.assert_array_equal(predict(hidden, tokens), predict(other_hidden, tokens))
    model.mtp.join = whole.at[:, :dim].set(0)
    np.testing.assert_array_equal(predict(hidden, tokens), predict(hidden, other_tokens))


def test_predictions_within_packed_sequences_do_not_see_their_neighbours():
    model = random_model()
    first, second = TOKENS[:11], TOKENS[5:24]
    packed = jnp.array([first + second])
    places = Places.packed(jnp.array([[1] * len(first) + [2] * len(second)]))
    together = predictions(model, packed, places)
    start = 0
    for part in (first, second):
        alone = predictions(model, jnp.array([part]), Places.unpadded(1, len(part)))
        for depth in (1, 2, 3):
            rows = len(part) - depth
            np.testing.assert_allclose(
                together[depth - 1][0, start : start + rows], alone[depth - 1][0, :rows], atol=2e-5
            )
        start += len(part)


def test_a_model_without_the_layer_says_so():
    model = random_model(TINY | {"num_nextn_predict_layers": 0})
    tokens = jnp.array([TOKENS])
    with pytest.raises(ValueError, match="no MTP layer"):
        predictions(model, tokens, Places.unpadded(*tokens.shape))


@pytest.mark.parametrize("portion", [5, 24])
def test_reading_ahead_with_a_cache_predicts_what_depth_one_does(portion):
    """In portions, and in pages that lie in any order; the first token has no row."""
    model, tokens = random_model(), jnp.array([TOKENS, TOKENS[::-1]])
    hidden = forward(model, tokens, Places.unpadded(*tokens.shape)).hidden_BTD
    places = Places.unpadded(*tokens.shape)
    ((expected, _),) = predict_ahead(model, hidden, tokens, places, depth=1)
    pools = Pools.create(model.config, 9, 8, jnp.float32, with_mtp=True)
    # What other sequences left behind must not be seen.
    pools = jax.tree.map(lambda leaf: leaf + 7, pools)
    pages = jnp.array([[4, 0, 7], [1, 8, 3]])
    cache = KVCache(pools, jnp.zeros(2, jnp.int32), jnp.dtype(jnp.float32), pages)
    before = jnp.pad(hidden[:, :-1], ((0, 0), (1, 0), (0, 0)), constant_values=7)
    step = jax.jit(read_ahead)
    for start in range(0, 24, portion):
        part = slice(start, min(start + portion, 24))
        there = Places(places.position_BT[:, part], places.segment_BT[:, part])
        ahead, cache, _ = step(model, before[:, part], tokens[:, part], there, cache)
        first = max(part.start, 1)
        np.testing.assert_allclose(
            ahead[:, first - part.start :], expected[:, first - 1 : part.stop - 1], atol=2e-5
        )


def test_reading_ahead_widens_no_experts_but_those_chosen():
    """XLA's CPU backend would widen all of them, and then copy a few."""
    config = load_preset("bench").config
    model = jax.eval_shape(for_decoding, abstract(Glm5(config), jnp.bfloat16))

    def step(model, cache, before, token):
        return read_ahead(model, before, token, cache.next_places(jnp.ones(1, int), 1), cache)

    pools = functools.partial(Pools.create, config, 8, 64, jnp.bfloat16, with_mtp=True)
    cache = KVCache(
        jax.eval_shape(pools),
        jax.ShapeDtypeStruct((1,), jnp.int32),
        jnp.dtype(jnp.bfloat16),
        jax.ShapeDtypeStruct((1, 8), jnp.int32),
    )
    before = jax.ShapeDtypeStruct((1, 1, config.dim), jnp.bfloat16)
    lowered = jax.jit(step).lower(model, cache, before, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    experts = jax.tree.leaves(model.mtp.experts)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in experts)
    assert lowered.compile().memory_analysis().temp_size_in_bytes < size / 2
