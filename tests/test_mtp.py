import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.model import forward, logits, predict_ahead
from glm5_jax.places import Places
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
