"""Perplexity against log-probabilities of whole texts, token by token."""

import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from jax.scipy.special import logsumexp

from glm5_jax.__main__ import main
from glm5_jax.collectives import MESH_AXES
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
from glm5_jax.inference.tokenizer import Tokenizer
from glm5_jax.mesh import make_mesh
from glm5_jax.model import forward, logits
from glm5_jax.places import Places
from glm5_jax.sharding import DECODE, Partition
from tests.tiny import TINY, random_model, random_weights, write_published
from tests.together import run_together

# Sizes that eight devices divide, a token for every byte, and few layers, which compile faster.
RAW = TINY | {
    "vocab_size": 320,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_hidden_layers": 2,
    "indexer_types": ["full", "shared"],
    "mlp_layer_types": ["dense", "sparse"],
}
END, START = "<|end|>", "<|start|>"
TEXT = "Selection takes eight of these tokens: café, 北京, 👋🏽.\nNo line is like another."
LENGTHS = (41, 9, 2, 25, 3, 64, 12)
TOLERANCE = {"rtol": 0, "atol": 1e-4}  # float32 sums over 320 scores, in other orders


def write_tokenizer(directory, special=()):
    """A tokenizer of bytes and a few joined ones, with special tokens around every text."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    joined = [("e", "s"), ("o", "k"), ("ok", "e"), ("Ġ", "t"), ("es", "e")]
    words = [START, END, *alphabet, *("".join(pair) for pair in joined)]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, joined))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([START, END])
    if special:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=" ".join(special), special_tokens=[(START, 0), (END, 1)]
        )
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    return Tokenizer(directory)


@functools.cache
def model():
    return random_model(RAW)


@functools.cache
def documents():
    """Of random tokens and several lengths."""
    rng = np.random.default_rng(0)
    return [Document(rng.integers(2, 320, n).tolist(), 1, 3 * n) for n in LENGTHS]


def partition(shape):
    devices = jax.devices()[: math.prod(shape)]
    return Partition(make_mesh(dict(zip(MESH_AXES, shape, strict=True)), devices), DECODE)


@jax.jit
def read(model, tokens, places):
    scores_TZ = logits(model, forward(model, tokens, places).hidden_BTD)[0]
    return scores_TZ - logsumexp(scores_TZ, axis=-1, keepdims=True)


def predictions(tokens):
    """The log-probabilities of what comes after each token."""
    padded = jnp.array([tokens + [0] * (128 - len(tokens))])
    places = Places.padded(jnp.arange(128)[None] < len(tokens))
    return np.asarray(read(model(), padded, places)[: len(tokens)])


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


@pytest.fixture(scope="module", params=[(), (START, "$A", END)], ids=["plain", "special"])
def directory(request, tmp_path_factory):
    """A published directory, with a tokenizer that puts something around texts and with another."""
    path = write_published(tmp_path_factory.mktemp("model"), RAW, random_weights(RAW))
    write_tokenizer(path, request.param)
    return path


def run(capsys, *arguments):
    status = main(["eval", *map(str, arguments)])
    return status, capsys.readouterr()


def expected_of(directory, text):
    """Nats, tokens and bytes of a text by hand."""
    tokenizer = Tokenizer(directory)
    tokens = tokenizer.encode(text)
    around = tokens[0] == 0
    tokens = tokens[:-1] if around else tokens
    given = [predictions(tokens)[t - 1, tokens[t]] for t in range(1, len(tokens))]
    num_bytes = len(text.encode()) - (0 if around else len(tokenizer.decode(tokens[:1])))
    return -float(np.sum(given)), len(given), num_bytes


def test_the_command_reports_a_text(directory, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT, newline="")
    status, output = run(capsys, "--model", directory, "--text", tmp_path / "text.txt", "--json")
    assert status == 0
    report = json.loads(output.out)
    nats, tokens, num_bytes = expected_of(directory, TEXT)
    assert (report["tokens"], report["bytes"], report["documents"]) == (tokens, num_bytes, 1)
    assert (report["window"], report["stride"], report["mtp"]) == (256, 128, [])
    np.testing.assert_allclose(report["nats_per_token"], nats / tokens, rtol=1e-5)
    np.testing.assert_allclose(report["perplexity"], math.exp(nats / tokens), rtol=1e-4)
    np.testing.assert_allclose(report["bits_per_byte"], nats / math.log(2) / num_bytes, rtol=1e-5)
    assert report["seconds"] * report["tokens_per_second"] == pytest.approx(tokens)


def test_the_command_reports_lines_of_texts(directory, tmp_path, capsys):
    texts = ["First: a line.", TEXT, "The limit\u2028 keeps this.", "not read"]
    lines = "".join(
        json.dumps({"text": text, "id": 1}, ensure_ascii=False) + "\n" for text in texts
    )
    (tmp_path / "texts.jsonl").write_text(lines + "{damaged")
    options = ("--jsonl", tmp_path / "texts.jsonl", "--limit", 3, "--mtp", 1)
    status, output = run(capsys, "--model", directory, *options, "--json")
    assert status == 0
    report = json.loads(output.out)
    expected = np.sum([expected_of(directory, text) for text in texts[:3]], axis=0)
    assert (report["tokens"], report["bytes"], report["documents"]) == (*expected[1:], 3)
    np.testing.assert_allclose(report["nats_per_token"] * expected[1], expected[0], rtol=1e-5)
    [ahead] = report["mtp"]
    # Without special tokens, the first two of a text are not predicted at depth 1, else one.
    assert (ahead["depth"], ahead["tokens"]) == (1, expected[1] - 3)
    assert ahead["perplexity"] == pytest.approx(math.exp(ahead["nats_per_token"]))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = write_published(tmp_path_factory.mktemp("model"), RAW, random_weights(RAW))
    write_tokenizer(path)
    return path


def test_the_report_is_in_words_too(plain, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("Tokens of bytes.")
    options = ("--text", tmp_path / "text.txt", "--mtp", 1, "--mesh", "data=8")
    status, output = run(capsys, "--model", plain, *options)
    assert status == 0
    nats, tokens, num_bytes = expected_of(plain, "Tokens of bytes.")
    first, second, third = output.out.splitlines()
    numbers = [float(number) for number in re.findall(r"\d+\.\d+", first)]
    per_token = nats / tokens
    expected = [math.exp(per_token), per_token, nats / math.log(2) / num_bytes]
    np.testing.assert_allclose(numbers, expected, rtol=1e-4)
    assert second.startswith("MTP depth 1: perplexity ")
    assert third.startswith(f"{tokens} tokens of 1 texts, {num_bytes} bytes, in ")


@pytest.mark.parametrize(
    ("content", "options", "named"),
    [
        (None, [], "No such file"),
        (b"", [], "is empty"),
        (b"\xef\xbb\xbf", [], "is empty"),
        (b"caf\xe9", [], "not UTF-8"),
        (b"a", [], "'a' has 1 tokens, expected at least 2"),
        (b"abc", ["--window", "1"], "--window is 1, expected from 2 to the model's 256"),
        (b"abc", ["--window", "257"], "--window is 257, expected from 2 to the model's 256"),
        (b"abc", ["--window", "16", "--stride", "16"], "expected from 1 to 15 with --window 16"),
        (b"abc", ["--window", "16", "--stride", "15", "--mtp", "1"], "and --mtp 1"),
        (b"abc", ["--window", "2", "--mtp", "1"], "--stride is 1, expected from 1 to 0"),
        (
            b"abc",
            ["--mtp", "2"],
            "--mtp is 2, but the longest text has 3 tokens: expected at most 1",
        ),
        (b"abc", ["--num-fewshot", "2"], "--num-fewshot is for tasks only"),
        (b"abc", ["--out", "results.json"], "--out is for tasks only"),
        (b"abc", ["--apply-chat-template"], "--apply-chat-template is for tasks only"),
    ],
)
def test_a_text_that_cannot_be_scored_is_one_line(plain, tmp_path, capsys, content, options, named):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    status, output = run(capsys, "--model", plain, "--text", path, *options)
    assert status == 2 and output.out == ""
    assert output.err.startswith("glm5: error: ") and output.err.count("\n") == 1
    assert named in output.err


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ('{"content": "x"}', '"text" is None, expected a text'),
        ('{"text": ["x"]}', "\"text\" is ['x'], expected a text"),
        ('{"text": ""}', "'' has 0 tokens"),
        ('{"text": "\\ud800 x"}', "not valid Unicode"),
    ],
)
def test_a_senseless_line_of_texts_is_named(plain, tmp_path, capsys, line, named):
    (tmp_path / "texts.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    status, output = run(capsys, "--model", plain, "--jsonl", tmp_path / "texts.jsonl")
    assert status == 2 and output.err.count("\n") == 1 and named in output.err


@pytest.mark.parametrize("options", [[], ["--text", "a", "--jsonl", "b"], ["--window", "x"]])
def test_senseless_options_are_one_line(plain, capsys, options):
    with pytest.raises(SystemExit) as caught:
        main(["eval", "--model", str(plain), *options])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


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


@pytest.mark.slow
def test_two_processes_report_what_one_does(plain, tmp_path, capsys):
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": TEXT}) + '\n{"text": "abc"}\n')
    command = ("eval", "--model", plain, "--jsonl", tmp_path / "texts.jsonl", "--json")
    status, output = run(capsys, *command[1:])
    first, second = run_together(*[("glm5_jax", *command)] * 2)
    assert (status, first.status, second) == (0, 0, (0, "", ""))
    expected, actual = json.loads(output.out), json.loads(first.output)
    for name in ("tokens", "bytes", "documents"):
        assert actual[name] == expected[name]
    assert actual["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)
