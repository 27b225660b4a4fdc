"""What accelerators compute, on the CPU: the same by other ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.cache import KVCache
from glm5_jax.collectives import platform, standing_in_for
from glm5_jax.model import forward, logits
from glm5_jax.places import Places
from tests.golden import CASES, golden_logits, golden_weights
from tests.tiny import SHARED, TOKENS, build_model, random_model

LENGTH = len(TOKENS)


def test_another_kind_of_device_is_stood_in_for_within_a_block_only():
    with pytest.raises(ValueError, match="left"), standing_in_for("tpu"):
        assert platform() == "tpu"
        raise ValueError("left")
    assert platform() == "cpu"


@pytest.mark.parametrize("case", CASES)
def test_logits_of_the_golden_model(case):
    raw = CASES[case]
    model = build_model(raw, golden_weights(raw))
    with standing_in_for("tpu"):
        hidden = forward(model, jnp.array([TOKENS]), Places.unpadded(1, LENGTH)).hidden_BTD
        actual = logits(model, hidden)[0]
    np.testing.assert_allclose(actual, golden_logits(case), atol=1e-5)


def test_decoding_and_gradients_are_those_of_a_cpu():
    model = random_model(SHARED)
    tokens = jax.random.randint(jax.random.key(0), (2, LENGTH), 0, SHARED["vocab_size"])
    first = np.array([LENGTH - 1, LENGTH - 4])

    def loss(model):
        hidden = forward(model, tokens, Places.unpadded(*tokens.shape), remat="layers").hidden_BTD
        return jnp.mean(jax.nn.log_softmax(logits(model, hidden))[..., 3])

    def decoded(model):
        cache = KVCache.create(model.config, 2, LENGTH + 3, jnp.float32)
        for count in (first, np.ones(2, np.int32)):
            places = cache.next_places(jnp.array(count), count.max())
            output = forward(model, tokens[:, : count.max()], places, cache)
            cache = output.cache
        return logits(model, output.hidden_BTD)

    def found():
        traced_anew = jax.jit(lambda model: (decoded(model), jax.grad(loss)(model)))
        return jax.tree.leaves(traced_anew(model))

    expected = found()
    with standing_in_for("tpu"):
        actual = found()
    for mine, theirs in zip(actual, expected, strict=True):
        assert np.abs(mine - theirs).max() <= 2e-5 * np.abs(theirs).max()
