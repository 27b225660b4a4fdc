"""A small model that has learned something, so that what it drafts is often right."""

import functools

import jax
import numpy as np
import optax

from glm5_jax.model import Glm5
from glm5_jax.places import Places
from tests.tiny import SHARED, random_model
from train.loss import Objective, loss

# Two layers and the MTP layer; 8 of up to 64 tokens are attended to.
LEARNER = SHARED | {
    "num_hidden_layers": 2,
    "mlp_layer_types": ["dense", "sparse"],
    "indexer_types": ["full", "shared"],
    "index_share_for_mtp_iteration": True,
}
PHRASES = np.array(
    [[3, 14, 15, 92, 65, 35, 89], [2, 71, 82, 81, 82, 84, 59], [16, 18, 3, 39, 88, 7, 4]]
)


def text(seed: int, length: int) -> list[int]:
    """Phrases one after the other, each chosen at random."""
    chosen = np.random.default_rng(seed).integers(0, len(PHRASES), length // 7 + 1)
    return PHRASES[chosen].reshape(-1)[:length].tolist()


@functools.cache
def trained_model() -> Glm5:
    """Learns the phrases, and to look three tokens ahead, in a few seconds."""
    objective = Objective(mtp_depth=3, mtp_weight=0.5, index_weight=1.0)
    optimizer = optax.adam(3e-3)
    model = random_model(LEARNER)
    state = optimizer.init(model)

    @jax.jit
    def step(model, state, tokens):
        places = Places.unpadded(*tokens.shape)
        gradient = jax.grad(lambda model: loss(model, tokens, places, objective)[0])(model)
        updates, state = optimizer.update(gradient, state, model)
        return optax.apply_updates(model, updates), state

    with jax.numpy_dtype_promotion("standard"):
        for number in range(60):
            tokens = np.array([text(8 * number + row, 48) for row in range(8)], np.int32)
            model, state = step(model, state, tokens)
    return model
