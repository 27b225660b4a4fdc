import io
import json

import pytest

from glm5_jax.__main__ import main
from tests.serving import write_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "chat")


@pytest.fixture
def chat(directory, monkeypatch, capsys):
    def talk(text, *options):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        arguments = ["chat", "--model", directory, "--temperature", 0, "--max-new-tokens", 8]
        status = main([str(word) for word in (*arguments, *options)])
        return status, capsys.readouterr()

    return talk


@pytest.fixture
def reply(directory, capsys, tmp_path):
    """What `glm5 generate` says to messages."""

    def generate(messages):
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text(json.dumps({"messages": messages}) + "\n")
        options = ["--prompts", prompts, "--max-new-tokens", 8, "--json"]
        main([str(word) for word in ("generate", "--model", directory, *options)])
        return json.loads(capsys.readouterr().out)["text"]

    return generate


def test_answers_are_those_to_the_whole_conversation(chat, reply):
    said = [{"role": "system", "content": "short"}]
    expected = []
    for text in ("one", "two"):
        said.append({"role": "user", "content": text})
        expected.append(reply(said))
        said.append({"role": "assistant", "content": expected[-1]})
    status, output = chat("one\n\ntwo\n", "--system", "short")
    assert status == 0
    assert output.out == "".join(text + "\n" for text in expected)
    assert "/new" in output.err


def test_a_new_conversation_forgets_the_old_one(chat):
    _, output = chat("one\n/new\none\n/exit\ntwo\n")
    first, second = output.out[: len(output.out) // 2], output.out[len(output.out) // 2 :]
    assert first == second


def test_a_seed_repeats_a_conversation_and_drafts_do_not_change_it(chat):
    options = ("--temperature", 1, "--seed", 5)
    once = chat("one\ntwo\n", *options, "--draft-tokens", 0)[1].out
    assert chat("one\ntwo\n", *options, "--draft-tokens", 3)[1].out == once
    assert chat("one\ntwo\n", "--temperature", 1, "--seed", 6)[1].out != once


def test_what_does_not_fit_is_said_and_the_conversation_goes_on(chat):
    long = "long " * 30
    _, output = chat(f"one\n{long}\none\n", "--context", 64)
    assert "needs a context of" in output.err
    _, expected = chat("one\none\n", "--context", 64)
    assert output.out == expected.out


def test_a_directory_without_a_template_is_refused_before_anything_is_loaded(
    chat, directory, tmp_path
):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (bare / name).write_bytes((directory / name).read_bytes())
    status, output = chat("one\n", "--model", bare)
    assert status == 2 and "has no chat_template.jinja" in output.err
    assert output.err.count("\n") == 1
