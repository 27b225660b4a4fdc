"""The same numbers as transformers 5.23, through files in the published layout."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.cache import KVCache
from glm5_jax.load import load_model
from glm5_jax.model import forward, logits, predict_ahead
from glm5_jax.places import Places
from tests.tiny import (
    GROUPED,
    SHARED,
    TINY,
    TOKENS,
    WIDE,
    float8_weights,
    random_weights,
    write_published,
)

torch = pytest.importorskip("torch", reason="PyTorch, the reference, is not installed")
hf = pytest.importorskip("tests.reference.hf", reason="transformers is not installed")

CONFIGS = {
    "full": TINY,
    "shared": SHARED,
    "pattern-and-groups": {key: x for key, x in GROUPED.items() if key != "indexer_types"}
    | {"index_topk_pattern": "FSFFSFS"},
}
BATCH, LENGTH = 3, 24
PROMPT = 13


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """transformers' model, and ours loaded from the directory that it saved."""
    raw = CONFIGS[request.param]
    reference = hf.hf_model(raw, random_weights(raw, seed=3))
    directory = tmp_path_factory.mktemp("saved")
    reference.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | hf.HF_LATENT_EPS))
    return reference, load_model(directory)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(2, TINY["vocab_size"], (BATCH, LENGTH))


@jax.jit
def run(model, tokens, places):
    return logits(model, forward(model, tokens, places).hidden_BTD)


@torch.no_grad()
def run_reference(reference, tokens, **kwargs):
    return reference(torch.as_tensor(tokens), use_cache=False, **kwargs).logits.float().numpy()


def test_logits_are_equal(pair, tokens):
    reference, model = pair
    actual = run(model, jnp.asarray(tokens), Places.unpadded(*tokens.shape))
    np.testing.assert_allclose(actual, run_reference(reference, tokens), atol=1e-4)


def test_every_layer_selects_the_same_tokens(pair, tokens):
    reference, model = pair
    picked = {}
    for number, layer in enumerate(reference.model.layers):
        if layer.self_attn.indexer is not None:
            layer.self_attn.indexer.register_forward_hook(
                lambda module, args, out, number=number: picked.update({number: out.numpy()})
            )
    run_reference(reference, tokens)
    assert sorted(picked) == [
        i for i, kind in enumerate(model.config.layers) if kind.indexer == "full"
    ]
    output = forward(
        model,
        jnp.asarray(tokens),
        Places.unpadded(*tokens.shape),
        observe=lambda report: report.selection,
    )
    latest = None
    for number, place in enumerate(model.config.places):
        latest = picked.get(number, latest)
        selection = output.observed[place.segment][place.slot]
        index, valid = (np.asarray(a)[place.group] for a in selection[:2])
        for row in range(BATCH):
            for t in range(LENGTH):
                expected = latest[row, t]  # with fewer than topk tokens, filled with later ones
                assert set(index[row, t][valid[row, t]]) == set(expected[expected <= t])


def test_greedy_continuation_is_the_same(pair, tokens):
    reference, model = pair
    prompt = tokens[:, :PROMPT]
    expected = reference.generate(
        torch.as_tensor(prompt),
        attention_mask=torch.ones(prompt.shape, dtype=torch.long),
        max_new_tokens=11,
        do_sample=False,
        eos_token_id=None,
    ).numpy()

    @jax.jit
    def step(model, cache, tokens):
        count = jnp.full(BATCH, tokens.shape[1])
        output = forward(model, tokens, cache.next_places(count, tokens.shape[1]), cache)
        last = logits(model, output.hidden_BTD[:, -1:])
        return jnp.argmax(last, axis=-1).astype(jnp.int32), output.cache

    cache = KVCache.create(model.config, BATCH, LENGTH, jnp.float32)
    fed, generated = jnp.asarray(prompt, jnp.int32), [prompt]
    for _ in range(11):
        fed, cache = step(model, cache, fed)
        generated.append(np.asarray(fed))
    np.testing.assert_array_equal(np.concatenate(generated, axis=1), expected)


def test_left_padded_logits_are_equal(pair, tokens):
    reference, model = pair
    mask = np.arange(LENGTH) >= np.array([[0], [5], [11]])
    expected = run_reference(reference, tokens, attention_mask=torch.as_tensor(mask).long())
    # transformers counts positions over padding unless told; only distances matter to attention
    actual = run(model, jnp.asarray(tokens), Places.padded(jnp.asarray(mask)))
    np.testing.assert_allclose(np.asarray(actual)[mask], expected[mask], atol=1e-4)


def test_bfloat16_is_no_further_from_float32_than_that_of_transformers(tmp_path, tokens):
    # Dense, for rounding flips selections in both, each in its own way.
    raw = TINY | hf.HF_LATENT_EPS | {"index_topk": 64}
    weights = random_weights(raw, seed=3)
    rounded = {
        name: torch.from_numpy(w).to(torch.bfloat16).float().numpy() for name, w in weights.items()
    }
    exact = run_reference(hf.hf_model(raw, rounded), tokens)
    theirs = run_reference(hf.hf_model(raw, rounded).to(torch.bfloat16), tokens)
    directory = write_published(tmp_path / "model", raw, rounded)
    model = load_model(directory, jnp.bfloat16)
    ours = run(model, jnp.asarray(tokens), Places.unpadded(*tokens.shape))
    assert np.abs(ours - exact).mean() <= np.abs(theirs - exact).mean()


def test_float8_weights_give_the_logits_of_their_dequantized_values(tmp_path):
    raw = WIDE | hf.HF_LATENT_EPS
    published, dequantized = float8_weights(random_weights(raw, seed=3))
    directory = write_published(tmp_path / "model", raw, published, num_shards=3)
    tokens = np.array([TOKENS])
    actual = run(load_model(directory), jnp.asarray(tokens), Places.unpadded(*tokens.shape))
    expected = run_reference(hf.hf_model(raw, dequantized), tokens)
    np.testing.assert_allclose(actual, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["full", "pattern-and-groups"])
def test_mtp_logits_are_those_of_the_layer_put_together_in_torch(tmp_path, tokens, name):
    raw = CONFIGS[name] | hf.HF_LATENT_EPS
    weights = random_weights(raw, seed=3)
    reference = hf.hf_model(raw, weights)
    mtp = hf.MtpLayer(raw)
    mtp.load(raw, weights)
    with torch.no_grad():
        hiddens = hf.mtp_hiddens(reference, mtp.eval(), torch.as_tensor(tokens), depth=3)
        expected = [reference.lm_head(hidden).numpy() for hidden in hiddens[1:]]
    model = load_model(write_published(tmp_path / "model", raw, weights))

    @jax.jit
    def predict(model, tokens):
        places = Places.unpadded(*tokens.shape)
        hidden = forward(model, tokens, places).hidden_BTD
        ahead = predict_ahead(model, hidden, tokens, places, depth=3)
        return [logits(model, hidden) for hidden, _ in ahead]

    for ours, theirs in zip(predict(model, jnp.asarray(tokens)), expected, strict=True):
        np.testing.assert_allclose(ours[:, : theirs.shape[1]], theirs, atol=1e-4)
