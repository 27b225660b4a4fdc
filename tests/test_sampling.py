import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm5_jax.errors import InputError
from glm5_jax.inference.request import Request, Sampling
from glm5_jax.inference.sampling import Choices, Seen, adjusted, heated, likelihoods, sample

VOCABULARY = 40

sample = jax.jit(sample, static_argnums=4)


@jax.jit
def drawn_from(logits, choices, seen):
    scores = heated(adjusted(logits, choices, seen, VOCABULARY), choices)
    return jax.nn.softmax(scores, axis=-1)


def requests(*ways, number=0):
    """One request for each `Sampling`, numbered on."""
    return [
        Request(prompt=(0,), max_new_tokens=1, sampling=way, number=number + row)
        for row, way in enumerate(ways)
    ]


def nothing_seen(batch, vocabulary=VOCABULARY):
    shape = (batch, vocabulary)
    return Seen(jnp.zeros(shape), jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32))


def draw(logits, way, num_tokens=None, count=1):
    """One token of each row of logits, the rows numbered."""
    logits = jnp.asarray(logits, jnp.float32)
    batch, vocabulary = logits.shape
    return np.asarray(
        sample(
            logits,
            Choices.of(requests(*[way] * batch)),
            nothing_seen(batch, vocabulary),
            jnp.full(batch, count),
            num_tokens or vocabulary,
        )
    )


def probabilities(logits, way, seen=None):
    seen = nothing_seen(1, logits.shape[-1]) if seen is None else seen
    return np.asarray(drawn_from(jnp.asarray(logits)[None], Choices.of(requests(way)), seen)[0])


def slowly(logits, way):
    """The distribution that is drawn from, by sorting, in float64."""
    scores = np.asarray(logits, np.float64) / way.temperature
    order = np.argsort(-scores, kind="stable")
    kept = np.zeros(len(scores), bool)
    kept[order[: way.top_k or len(order)]] = True
    p = np.where(kept, np.exp(scores - scores.max()), 0)
    p /= p.sum()
    before = np.concatenate([[0], np.cumsum(p[order])[:-1]])
    kept[order] &= before < way.top_p
    kept &= p >= way.min_p * p.max()
    p = np.where(kept, p, 0)
    return p / p.sum()


def test_without_temperature_the_likeliest_token_is_taken_the_lowest_first():
    logits = [[0.0, 3.0, 3.0, 1.0], [2.0, 0.0, 1.0, 2.0]]
    np.testing.assert_array_equal(draw(logits, Sampling()), [1, 0])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_those_of_the_heated_distribution(temperature):
    logits = jnp.array([0.0, 1.0, 2.0, -1.0])
    drawn = draw(jnp.tile(logits, (4000, 1)), Sampling(temperature=temperature))
    expected = 4000 * np.asarray(jax.nn.softmax(logits / temperature))
    counts = np.bincount(drawn, minlength=4)
    # chi-squared with 3 degrees of freedom exceeds 16.3 once in 1000 times
    assert np.sum((counts - expected) ** 2 / expected) < 16.3


@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_padding_of_the_vocabulary_is_never_drawn(temperature):
    logits = jnp.tile(jnp.array([0.0, 0.0, 50.0, 60.0]), (4000, 1))
    assert np.all(draw(logits, Sampling(temperature=temperature), num_tokens=2) < 2)


@pytest.mark.parametrize("temperature", [1e-45, 1e-39, 1e-30, 1e30, 1e300])
def test_no_temperature_draws_what_is_not_legal(temperature):
    logits = [[-3.0, -1.0, -2.0, 5.0, 5.0]] * 8
    drawn = draw(logits, Sampling(temperature=temperature), num_tokens=3)
    assert set(drawn.tolist()) <= ({0, 1, 2} if temperature > 1 else {1})


def test_a_row_draws_the_same_whatever_its_neighbours():
    logits = jax.random.normal(jax.random.key(1), (50, VOCABULARY))
    warm, mixed = Sampling(temperature=1.0), Sampling(temperature=1.0, top_p=0.5, seed=9)
    together = draw(logits, warm)
    others = [warm if row % 2 else mixed for row in range(50)]
    among = sample(
        logits, Choices.of(requests(*others)), nothing_seen(50), jnp.ones(50, int), VOCABULARY
    )
    for row in range(50):
        alone = sample(
            logits[row : row + 1],
            Choices.of(requests(warm, number=row)),
            nothing_seen(1),
            jnp.ones(1, int),
            VOCABULARY,
        )
        assert alone[0] == together[row]
        assert not row % 2 or among[row] == together[row]


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([0.1, 1.0, 6.0]),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.integers(0, VOCABULARY + 5),
    top_p=st.floats(0.01, 1.0),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
)
def test_what_is_left_out_is_what_sorting_leaves_out(
    seed, spread, temperature, top_k, top_p, min_p
):
    logits = (spread * np.random.default_rng(seed).standard_normal(VOCABULARY)).astype(np.float32)
    way = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    actual, expected = probabilities(logits, way), slowly(logits, way)
    if np.sum((actual > 0) != (expected > 0)):  # sums in another order may differ at the brink
        near = [slowly(logits, Sampling(**{**vars(way), "top_p": p})) for p in _around(top_p)]
        assert any(np.array_equal(actual > 0, each > 0) for each in near)
    else:
        np.testing.assert_allclose(actual, expected, atol=1e-6)


def _around(top_p):
    return [min(1.0, top_p + 1e-6), max(1e-9, top_p - 1e-6)]


@pytest.mark.parametrize("top_p", [1e-60, 1e-40, 1e-38, 1e-30])
def test_the_likeliest_token_is_never_left_out(top_p):
    logits = np.random.default_rng(0).standard_normal(VOCABULARY).astype(np.float32)
    kept = probabilities(logits, Sampling(temperature=1.0, top_p=top_p))
    np.testing.assert_array_equal(kept, np.arange(VOCABULARY) == np.argmax(logits))


def test_equally_likely_tokens_stay_together():
    logits = np.array([1.0, 0.0, 1.0, 1.0, -2.0], np.float32)
    kept = probabilities(logits, Sampling(temperature=1.0, top_k=2))
    np.testing.assert_allclose(kept, [1 / 3, 0, 1 / 3, 1 / 3, 0], atol=1e-6)


def test_the_distribution_is_that_of_transformers():
    """Its warpers and processors, in the order in which it applies them."""
    torch = pytest.importorskip("torch", reason="PyTorch, the reference, is not installed")
    from transformers.generation import logits_process as reference

    rng = np.random.default_rng(3)
    for _ in range(20):
        logits = (4 * rng.standard_normal(VOCABULARY)).astype(np.float32)
        seen = rng.integers(0, VOCABULARY, 8).tolist()
        steps = [
            reference.RepetitionPenaltyLogitsProcessor(1.3),
            reference.TemperatureLogitsWarper(0.7),
            reference.TopKLogitsWarper(12),
            reference.TopPLogitsWarper(0.8),
            reference.MinPLogitsWarper(0.05),
        ]
        scores = torch.tensor(logits)[None]
        for step in steps:
            scores = step(torch.tensor([seen]), scores)
        expected = torch.softmax(scores, dim=-1)[0].numpy()
        in_prompt = jnp.zeros((1, VOCABULARY), bool).at[0, jnp.array(seen)].set(True)
        way = Sampling(temperature=0.7, top_k=12, top_p=0.8, min_p=0.05, repetition_penalty=1.3)
        actual = probabilities(logits, way, nothing_seen(1)._replace(in_prompt_BZ=in_prompt))
        np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_penalties_and_biases_change_the_scores_as_they_say():
    logits = np.array([2.0, -2.0, 1.0, 0.5, 3.0], np.float32)
    way = Sampling(
        repetition_penalty=2.0,
        presence_penalty=0.25,
        frequency_penalty=0.5,
        logit_bias={3: 7.0, 4: -100.0},
    )
    seen = Seen(
        jnp.array([[0, 0, 0, 7.0, -100.0]]),
        jnp.array([[True, True, False, False, False]]),
        jnp.array([[0, 0, 3, 0, 0]]),
    )
    scores = adjusted(jnp.asarray(logits)[None], Choices.of(requests(way)), seen, 5)[0]
    # in the prompt: 2 / 2 and -2 * 2; generated three times: 1 / 2 - 3 * 0.5 - 0.25; biased
    np.testing.assert_allclose(scores, [1.0, -4.0, -1.25, 7.5, -97.0], atol=1e-6)


def test_likelihoods_are_of_the_bare_scores_and_in_order():
    rng = np.random.default_rng(5)
    logits = jnp.asarray(rng.standard_normal((3, VOCABULARY)), jnp.float32)
    token = jnp.array([4, 0, 29])
    found = likelihoods(logits, token, jnp.array([False, True, False]), 30, 5)
    expected = np.asarray(jax.nn.log_softmax(logits[:, :30], axis=-1))
    np.testing.assert_allclose(found.logprob_B, expected[np.arange(3), token], atol=1e-6)
    order = np.argsort(-expected, axis=-1)[:, :5]
    np.testing.assert_array_equal(found.best_BM, order)
    np.testing.assert_allclose(
        found.best_logprob_BM, np.take_along_axis(expected, order, axis=-1), atol=1e-6
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("top_k", 2**31),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e39),
        ("presence_penalty", 2.5),
        ("frequency_penalty", float("nan")),
        ("logit_bias", {3: 101.0}),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_a_senseless_way_of_drawing_is_named(field, value):
    with pytest.raises(InputError, match=field.split("_")[0]):
        Sampling(**{field: value})
