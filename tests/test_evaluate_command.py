"""`glm5 eval` of texts, against log-probabilities by hand."""

import json
import math
import re

import numpy as np
import pytest

from glm5_jax.__main__ import main
from glm5_jax.inference.tokenizer import Tokenizer
from tests.likelihood import END, RAW, START, TEXT, predictions, write_tokenizer
from tests.tiny import random_weights, write_published
from tests.together import run_together


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
