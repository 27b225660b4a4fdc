import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.cache import KVCache
from glm5_jax.model import forward, logits
from glm5_jax.params import leaves_by_path
from glm5_jax.places import Places
from tests.golden import CASES, golden_logits, golden_weights
from tests.reference.numpy_glm5 import NumpyGlm5
from tests.tiny import GROUPED, SHARED, TINY, TOKENS, build_model, random_model, random_weights

LENGTH = len(TOKENS)
CONFIGS = {"full": TINY, "shared": SHARED, "grouped": GROUPED}


@jax.jit
def run(model, tokens, places):
    return logits(model, forward(model, tokens, places).hidden_BTD)


@functools.partial(jax.jit, donate_argnums=1)
def step(model, cache, tokens, count):
    """Feeds the first `count` tokens of each row; returns all logits and the cache."""
    output = forward(model, tokens, cache.next_places(count, tokens.shape[1]), cache)
    return logits(model, output.hidden_BTD), output.cache


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return random_model(CONFIGS[request.param])


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(0), (3, LENGTH), 0, TINY["vocab_size"])


@pytest.mark.parametrize("case", CASES)
def test_logits_of_the_golden_model(case):
    raw = CASES[case]
    model = build_model(raw, golden_weights(raw))
    actual = run(model, jnp.array([TOKENS]), Places.unpadded(1, LENGTH))[0]
    np.testing.assert_allclose(actual, golden_logits(case), atol=1e-5)


@pytest.mark.parametrize("raw", CONFIGS.values(), ids=CONFIGS)
def test_logits_and_selections_are_those_of_the_reference(raw):
    weights = random_weights(raw)
    reference = NumpyGlm5(weights, raw)
    hidden, expected = reference.hidden(TOKENS)
    model = build_model(raw, weights)
    output = forward(
        model,
        jnp.array([TOKENS]),
        Places.unpadded(1, LENGTH),
        observe=lambda report: report.selection,
    )
    actual = logits(model, output.hidden_BTD)[0]
    np.testing.assert_allclose(actual, hidden @ reference.w["lm_head.weight"].T, atol=1e-4)
    for layer, place in enumerate(model.config.places):
        selection = output.observed[place.segment][place.slot]
        index, valid = (np.asarray(a)[place.group, 0] for a in selection[:2])
        for t in range(LENGTH):
            np.testing.assert_array_equal(np.sort(index[t][valid[t]]), expected[layer][t])


def test_later_tokens_do_not_change_earlier_logits(model, tokens):
    places = Places.unpadded(*tokens.shape)
    changed = tokens.at[:, 15:].set((tokens[:, 15:] + 1) % 97)
    before, after = run(model, tokens, places), run(model, changed, places)
    np.testing.assert_array_equal(before[:, :15], after[:, :15])
    assert jnp.all(jnp.any(before[:, 15:] != after[:, 15:], axis=-1))


def test_rows_of_a_batch_do_not_depend_on_each_other(model, tokens):
    whole = run(model, tokens, Places.unpadded(*tokens.shape))
    for row in range(len(tokens)):
        alone = run(model, tokens[row : row + 1], Places.unpadded(1, LENGTH))
        np.testing.assert_allclose(alone[0], whole[row], atol=2e-5)


def test_a_permuted_batch_gives_permuted_logits(model, tokens):
    places = Places.unpadded(*tokens.shape)
    order = jnp.array([2, 0, 1])
    np.testing.assert_allclose(
        run(model, tokens[order], places), run(model, tokens, places)[order], atol=2e-5
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_the_logits_of_tokens(model, tokens, side):
    lengths = [LENGTH, 17, 9]
    rows, masks = [], []
    for row, length in zip(np.asarray(tokens), lengths, strict=True):
        pad = LENGTH - length + 4
        widths = (pad, 0) if side == "left" else (0, pad)
        rows.append(np.pad(row[:length], widths, constant_values=5)[: LENGTH + 4])
        masks.append(np.pad(np.ones(length, bool), widths)[: LENGTH + 4])
    mask = np.stack(masks)
    padded = run(model, jnp.asarray(np.stack(rows)), Places.padded(jnp.asarray(mask)))
    for row, length in enumerate(lengths):
        alone = run(model, tokens[row : row + 1, :length], Places.unpadded(1, length))[0]
        np.testing.assert_allclose(np.asarray(padded)[row][mask[row]], alone, atol=2e-5)


def test_packed_sequences_do_not_see_each_other(model, tokens):
    first, second = tokens[0, :14], tokens[1, :20]
    packed = jnp.concatenate([first, second, jnp.zeros(3, jnp.int32)])[None]
    segments = jnp.array([[1] * 14 + [2] * 20 + [0] * 3])
    together = run(model, packed, Places.packed(segments))[0]
    for part, row, length in ((together[:14], 0, 14), (together[14:34], 1, 20)):
        alone = run(model, tokens[row : row + 1, :length], Places.unpadded(1, length))[0]
        np.testing.assert_allclose(part, alone, atol=2e-5)


@pytest.mark.parametrize("capacity", [LENGTH, 64])
def test_decoding_one_by_one_equals_reading_at_once(model, tokens, capacity):
    expected = run(model, tokens, Places.unpadded(*tokens.shape))
    cache = KVCache.create(model.config, len(tokens), capacity, jnp.float32)
    prefilled, cache = step(model, cache, tokens[:, :13], jnp.full(3, 13))
    np.testing.assert_allclose(prefilled, expected[:, :13], atol=2e-5)
    for t in range(13, LENGTH):
        decoded, cache = step(model, cache, tokens[:, t : t + 1], jnp.ones(3, jnp.int32))
        np.testing.assert_allclose(decoded[:, 0], expected[:, t], atol=2e-5)
    np.testing.assert_array_equal(cache.length_B, LENGTH)


def test_rows_of_a_cache_have_lengths_of_their_own(model, tokens):
    expected = run(model, tokens, Places.unpadded(*tokens.shape))
    cache = KVCache.create(model.config, 3, 40, jnp.float32)
    lengths = jnp.array([20, 6, 13])
    _, cache = step(model, cache, tokens[:, :20], lengths)
    np.testing.assert_array_equal(cache.length_B, lengths)
    for n in range(4):
        fed = jnp.take_along_axis(tokens, cache.length_B[:, None], axis=1)
        decoded, cache = step(model, cache, fed, jnp.ones(3, jnp.int32))
        for row in range(3):
            place = int(lengths[row]) + n
            np.testing.assert_allclose(decoded[row, 0], expected[row, place], atol=2e-5)


def test_a_row_that_feeds_nothing_keeps_its_cache(model, tokens):
    cache = KVCache.create(model.config, 3, 40, jnp.float32)
    _, cache = step(model, cache, tokens[:, :10], jnp.array([10, 10, 10]))
    before = jax.tree.map(np.asarray, cache)
    _, cache = step(model, cache, tokens[:, 10:12], jnp.array([2, 0, 1]))
    for old, new in zip(jax.tree.leaves(before.pools), jax.tree.leaves(cache.pools), strict=True):
        np.testing.assert_array_equal(old[:, 1], new[:, 1])
    np.testing.assert_array_equal(cache.length_B, [12, 10, 11])


def test_tokens_beyond_the_capacity_are_not_stored(model, tokens):
    cache = KVCache.create(model.config, 3, 12, jnp.float32)
    _, cache = step(model, cache, tokens[:, :12], jnp.full(3, 12))
    before = jax.tree.map(np.asarray, cache.pools)
    _, cache = step(model, cache, tokens[:, 12:13], jnp.ones(3, jnp.int32))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(cache.pools), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_bfloat16_model_decodes_what_it_reads_at_once(tokens):
    # All tokens and all experts are selected, for rounding changes choices, and with them logits.
    raw = TINY | {"index_topk": 64, "num_experts_per_tok": 8}
    model = build_model(raw, random_weights(raw), jnp.bfloat16)
    cache = KVCache.create(model.config, 3, 32, jnp.bfloat16)
    expected = run(model, tokens, Places.unpadded(*tokens.shape))
    for t in range(LENGTH):
        decoded, cache = step(model, cache, tokens[:, t : t + 1], jnp.ones(3, jnp.int32))
        np.testing.assert_allclose(decoded[:, 0], expected[:, t], atol=0.15)


def gradient_of(model, tokens, remat):
    """A compiled gradient."""
    places = Places.unpadded(*tokens.shape)

    def loss(model):
        hidden = forward(model, tokens, places, remat=remat).hidden_BTD
        return jnp.mean(jnp.square(logits(model, hidden)))

    return jax.jit(jax.grad(loss)).lower(model).compile()


def test_remat_does_not_change_gradients(model, tokens):
    plain, rematted = (gradient_of(model, tokens, remat)(model) for remat in ("none", "layers"))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(rematted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(("raw", "remat"), [(SHARED, "none"), (GROUPED, "layers")])
def test_gradients_of_experts_are_summed_where_they_are(tokens, raw, remat, monkeypatch):
    """They are those of layers whose own are summed apart, which needs copies of them."""
    model = random_model(raw)
    in_place = gradient_of(model, tokens, remat)
    monkeypatch.setattr("glm5_jax.segment._can_teach_in_place", lambda *_: False)
    apart = gradient_of(model, tokens, remat)
    sizes = [way.memory_analysis().temp_size_in_bytes for way in (in_place, apart)]
    assert sizes[0] < sizes[1]
    for a, b in zip(*(jax.tree.leaves(way(model)) for way in (in_place, apart)), strict=True):
        np.testing.assert_array_equal(a, b)


def index_nats(model, tokens):
    """The mean divergence of every layer's indexer, in the order of the layers."""
    places = Places.unpadded(*tokens.shape)
    output = forward(
        model, tokens, places, teach_indexers=True, observe=lambda report: report.index_nats
    )
    return [
        float(output.observed[place.segment][place.slot][place.group]) / tokens.size
        for place in model.config.places
    ]


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("full", {0: 0.268970, 3: 0.171412, 6: 0.124529}),
        ("dense_equiv", {0: 0.407877, 3: 0.301831, 6: 0.256775}),
        ("indexshare", {0: 0.268970, 6: 0.139786}),
    ],
)
def test_indexers_of_the_golden_model_are_as_far_off_as_they_should_be(case, expected):
    """Values of a float64 implementation that computes attention and scores in full."""
    raw = CASES[case]
    nats = index_nats(build_model(raw, golden_weights(raw)), jnp.array([TOKENS]))
    for layer, value in expected.items():
        np.testing.assert_allclose(nats[layer], value, atol=1e-5)


@jax.jit
@jax.grad
def index_gradient(model, tokens):
    """Of the divergence of all indexers, in nats per token."""
    output = forward(
        model,
        tokens,
        Places.unpadded(*tokens.shape),
        teach_indexers=True,
        observe=lambda report: report.index_nats,
    )
    return sum(jnp.sum(nats) for nats in jax.tree.leaves(output.observed)) / tokens.size


def test_only_indexers_learn_from_their_divergence(model, tokens):
    for path, leaf in leaves_by_path(index_gradient(model, tokens)).items():
        moved = bool(jnp.any(leaf != 0))
        assert moved == (".indexer." in path and not path.startswith("mtp.")), path


@pytest.mark.parametrize("length", [8, 24], ids=["all", "selected"])
def test_indexers_come_closer_to_the_attention_paid_by_following_their_gradient(length):
    model = random_model(TINY | {"num_nextn_predict_layers": 0})
    tokens = jnp.array([TOKENS[:length]])
    before = index_nats(model, tokens)

    for _ in range(10):
        model = jax.tree.map(lambda w, g: w - 0.3 * g, model, index_gradient(model, tokens))
    after = index_nats(model, tokens)
    assert all(new < old for new, old in zip(after, before, strict=True))
