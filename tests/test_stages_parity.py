"""Each stage of training against torch: losses, and the gradient of every weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.load import load_model
from glm5_jax.params import leaves_by_path
from glm5_jax.places import Places
from glm5_jax.published.names import published_tensors
from tests.tiny import GROUPED, SHARED, TINY, random_weights, write_published
from train.loss import Objective, loss
from train.state import assemble

torch = pytest.importorskip("torch", reason="PyTorch, the reference, is not installed")
hf = pytest.importorskip("tests.reference.hf", reason="transformers is not installed")
learning = pytest.importorskip("tests.reference.learning")

LENGTH, DEPTH = 24, 2
GROUPS = {key: x for key, x in GROUPED.items() if key != "indexer_types"}
CONFIGS = {"full": TINY, "shared": SHARED, "groups": GROUPS | {"index_topk_pattern": "FSFFSFS"}}
CASES = [("full", "sparse"), ("groups", "sparse")]
CASES += [("shared", stage) for stage in ("dense", "warmup", "sparse")]


def expected_of(raw, weights, tokens, stage):
    """The language loss, the indexers' divergence, and all gradients by published name."""
    raw = raw if stage == "sparse" else raw | {"index_topk": LENGTH}
    reference, mtp = hf.hf_model(raw, weights), hf.MtpLayer(raw)
    mtp.load(raw, weights)
    given = torch.as_tensor(tokens)
    with learning.watched(reference, mtp) as found:
        hiddens = hf.mtp_hiddens(reference, mtp, given, DEPTH)
    language = 0.0
    for depth, hidden in enumerate(hiddens):
        scores = reference.lm_head(hidden[:, : LENGTH - 1 - depth])
        nats = torch.nn.functional.cross_entropy(
            scores.flatten(0, 1), given[:, 1 + depth :].flatten()
        )
        language = language + nats * (1 if depth == 0 else 0.3 / DEPTH)
        if depth == 0:
            language = language + 1e-3 * scores.logsumexp(-1).square().mean()
    assert len(found) == reference.config.num_hidden_layers + DEPTH
    nats = torch.cat([each.flatten() for each in found]).mean()
    total = {"dense": language, "warmup": 0.7 * nats, "sparse": language + 0.7 * nats}[stage]
    total.backward()
    return total.item(), nats.item(), hf.gradients(reference) | mtp.gradients(raw)


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_gradients_are_those_of_torch(tmp_path, name, stage):
    raw = CONFIGS[name] | hf.HF_LATENT_EPS
    weights = random_weights(raw, seed=3)
    tokens = np.random.default_rng(0).integers(2, TINY["vocab_size"], (3, LENGTH))
    expected_loss, nats, expected = expected_of(raw, weights, tokens, stage)

    model = load_model(write_published(tmp_path / "model", raw, weights))
    objective = Objective(
        stage=stage, mtp_depth=DEPTH, mtp_weight=0.3, index_weight=0.7, z_weight=1e-3
    )
    config, places = objective.attending(model.config), Places.unpadded(*tokens.shape)

    @jax.jit
    def learn(params):
        def minimised(params):
            return loss(assemble(config, params), jnp.asarray(tokens), places, objective)

        return jax.value_and_grad(minimised, has_aux=True)(params)

    (actual_loss, (losses, _)), actual = learn(leaves_by_path(model))
    np.testing.assert_allclose(actual_loss, expected_loss, rtol=1e-5)
    if stage != "dense":
        np.testing.assert_allclose(losses.indexers, nats, rtol=1e-5)
    compared = 0
    for tensor in published_tensors(model.config):
        ours = np.asarray(actual[tensor.leaf])[tensor.at].reshape(tensor.shape)
        moves = objective.moves(tensor.leaf) and not tensor.leaf.endswith("router.bias")
        assert moves or not ours.any(), tensor.name
        if moves:
            theirs = expected.get(tensor.name, np.zeros(tensor.shape))  # an expert nobody chose
            scale = max(1, np.abs(theirs).max())
            np.testing.assert_allclose(ours, theirs, atol=2e-5 * scale, err_msg=tensor.name)
            compared += bool(theirs.any())
    assert compared > (15 if stage == "warmup" else 150)
