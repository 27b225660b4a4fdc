"""Perplexity against log-probabilities of whole texts, token by token."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm5_jax.errors import InputError
from glm5_jax.inference.evaluate import (
    Document,
    Scorer,
    Span,
    check_windows,
    cut_windows,
    encode_document,
    measure,
    special_prefix,
)
from glm5_jax.inference.score import score
from tests.likelihood import END, RAW, START, TEXT, model, partition, predictions, write_tokenizer
from tests.tiny import random_model

LENGTHS = (41, 9, 2, 25, 3, 64, 12)
TOLERANCE = {"rtol": 0, "atol": 1e-4}  # float32 sums over 320 scores, in other orders


@functools.cache
def documents():
    """Of random tokens and several lengths."""
    rng = np.random.default_rng(0)
    return [Document(rng.integers(2, 320, n).tolist(), 1, 3 * n) for n in LENGTHS]


def ignore(count):
    """Shows no progress."""


def test_log_probabilities_are_those_of_score():
    tokens = documents()[0].tokens
    [(index, scored)] = Scorer(model(), depth=2)([Span(tokens, 7)])
    [expected] = score(model(), np.array([tokens]), 2)
    assert index == 0
    np.testing.assert_allclose(scored.logprobs[0], expected["logprobs"][6:], **TOLERANCE)
    likeliest = expected["logits"][6:-1].argmax(-1)
    np.testing.assert_array_equal(scored.is_likeliest, likeliest == tokens[7:])
    for depth in (1, 2):
        scores = expected[f"mtp_logits_{depth}"]
        logprobs = scores - np.logaddexp.reduce(scores, axis=-1, keepdims=True)
        # Row i predicts token i + 1 + depth, and token 7 is the first that is scored.
        given = [logprobs[t - 1 - depth, tokens[t]] for t in range(7, len(tokens))]
        np.testing.assert_allclose(scored.logprobs[depth], given, **TOLERANCE)


def test_a_text_too_short_to_predict_ahead_counts_nothing_there():
    tokens = documents()[0].tokens
    scored = dict(Scorer(model(), depth=2)([Span(tokens[:2], 1), Span(tokens[:9], 1)]))
    assert [len(logprobs) for logprobs in scored[0].logprobs] == [1, 0, 0]
    assert [len(logprobs) for logprobs in scored[1].logprobs] == [8, 7, 6]


def test_a_greedy_continuation_is_all_likeliest():
    tokens = documents()[1].tokens
    for _ in range(12):
        tokens = [*tokens, int(predictions(tokens)[-1].argmax())]
    other = (tokens[15] + 1) % 320
    changed = [*tokens[:15], other, *tokens[16:]]
    scored = dict(Scorer(model())([Span(tokens, 9), Span(changed, 9)]))
    assert scored[0].is_likeliest.all()
    assert scored[1].is_likeliest.tolist()[:7] == [True] * 6 + [False]


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 8), (2, 2, 2)])
def test_of_equally_likely_tokens_the_first_counts(shape):
    even = jax.tree.map(lambda leaf: leaf, model())
    even.head = jnp.zeros_like(even.head)
    [(_, scored)] = Scorer(even, partition(shape))([Span([5, 0, 7, 45, 0, 319], 1)])
    assert scored.is_likeliest.tolist() == [True, False, False, True, False]
    np.testing.assert_allclose(scored.logprobs[0], -math.log(320), rtol=1e-6)


@pytest.mark.parametrize(("window", "stride"), [(16, 5), (16, 15), (17, 8), (2, 1)])
def test_windows_score_each_token_in_its_context(window, stride):
    tokens = documents()[0].tokens
    [result] = measure(Scorer(model()), documents()[:1], window, stride, ignore)
    expected = 0.0
    for place in range(1, len(tokens)):
        start = 0
        if place >= window:  # in the first window that ends behind it
            ends = range(window, len(tokens) + stride, stride)
            start = min(next(end for end in ends if end > place), len(tokens)) - window
        assert place - start >= min(place, window - stride)
        expected -= predictions(tokens[start:place])[-1, tokens[place]]
    assert result.tokens == len(tokens) - 1
    np.testing.assert_allclose(result.nats, expected, rtol=1e-5)


@given(st.integers(2, 60), st.integers(1, 4), st.integers(2, 20), st.data())
def test_windows_cover_each_token_once(length, first, window, data):
    first = min(first, length - 1)
    stride = data.draw(st.integers(1, window - 1))
    tokens = list(range(length))
    covered = []
    for span in cut_windows(Document(tokens, first, 0), window, stride):
        assert span.tokens == tokens[span.tokens[0] : span.tokens[-1] + 1]
        assert len(span.tokens) == min(window, length) or span.tokens[0] == 0
        for place in range(span.first, len(span.tokens)):
            token = span.tokens[place]
            assert place >= min(token, window - stride)
            covered.append(token)
    assert covered == tokens[first:]


@functools.cache
def on_one_device():
    return measure(Scorer(model(), depth=2), documents(), 16, 6, ignore)


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_batches_do_not_change_the_perplexity(batch_size):
    scorer = Scorer(model(), batch_size=batch_size, depth=2)
    actual = measure(scorer, documents(), 16, 6, ignore)
    for a, b in zip(actual, on_one_device(), strict=True):
        assert a.tokens == b.tokens
        np.testing.assert_allclose(a.nats, b.nats, rtol=1e-6)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 1, 8), (2, 2, 2)])
def test_meshes_do_not_change_the_perplexity(shape):
    scorer = Scorer(model(), partition(shape), batch_size=3, depth=2)
    actual = measure(scorer, documents(), 16, 6, ignore)
    for a, b in zip(actual, on_one_device(), strict=True):
        assert a.tokens == b.tokens
        np.testing.assert_allclose(a.nats, b.nats, rtol=1e-6)


def test_long_rows_are_scored_in_blocks(monkeypatch):
    monkeypatch.setattr("glm5_jax.queries.BLOCK_BYTES", 2**16)
    # On a partition of its own, for which nothing is compiled yet.
    scorer = Scorer(model(), partition((1, 1, 1)), depth=2)
    actual = measure(scorer, documents(), 16, 6, ignore)
    for a, b in zip(actual, on_one_device(), strict=True):
        np.testing.assert_allclose(a.nats, b.nats, rtol=1e-6)


def test_rows_of_a_batch_do_not_see_each_other():
    long, other = documents()[5].tokens[:30], documents()[0].tokens[:30]
    scorer = Scorer(model(), batch_size=2, depth=1)
    rows = [dict(scorer([Span(long[:11], 1), Span(beside, 1)]))[0] for beside in (long, other)]
    np.testing.assert_array_equal(rows[0].logprobs[0], rows[1].logprobs[0])
    np.testing.assert_array_equal(rows[0].logprobs[1], rows[1].logprobs[1])


def test_later_tokens_do_not_count():
    tokens = documents()[5].tokens
    scorer = Scorer(model(), batch_size=2, depth=1)
    scored = dict(scorer([Span(tokens[:20], 1), Span(tokens, 1)]))
    for depth in (0, 1):
        short, long = (scored[index].logprobs[depth] for index in (0, 1))
        np.testing.assert_allclose(short, long[: len(short)], **TOLERANCE)


@pytest.mark.parametrize(
    ("special", "prefix"),
    [((), []), ((START, "$A"), [0]), ((START, END, "$A", END), [0, 1]), (("$A", END), [])],
)
def test_special_tokens_before_a_text_are_context_only(tmp_path, special, prefix):
    tokenizer = write_tokenizer(tmp_path, special)
    assert special_prefix(tokenizer) == prefix
    document = encode_document(TEXT, tokenizer, prefix, "text")
    plain = tokenizer.encode(TEXT, special=False)
    assert len(plain) < len(TEXT.encode())
    assert document == (
        [*prefix, *plain],
        max(len(prefix), 1),
        len(TEXT.encode()) - (0 if prefix else 1),  # the first token is the letter S
    )


def test_a_first_token_may_be_a_part_of_a_character(tmp_path):
    document = encode_document("北京", write_tokenizer(tmp_path), [], "text")
    assert (len(document.tokens), document.num_bytes) == (6, 5)


def test_tokens_outside_the_vocabulary_are_refused():
    with pytest.raises(InputError, match="token 320 of the text is outside the vocabulary"):
        list(Scorer(model())([Span([5, 320, 7], 1)]))


def test_predicting_ahead_needs_the_layer():
    raw = RAW | {"num_nextn_predict_layers": 0}
    with pytest.raises(InputError, match="no MTP layer"):
        Scorer(random_model(raw), depth=1)


def test_damaged_weights_are_told():
    damaged = jax.tree.map(lambda leaf: leaf, model())
    damaged.norm = damaged.norm * jnp.nan
    with pytest.raises(InputError, match="nan nats per token, .* weights are damaged"):
        measure(Scorer(damaged), documents()[:1], 64, 32, ignore)


def test_windows_fit_the_model():
    check_windows(256, 255, 0, model().config)
    with pytest.raises(InputError, match="--stride is 0"):
        check_windows(256, 0, 0, model().config)
