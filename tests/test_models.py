"""The models that come along are whole, small and trained."""

import ast
import json

import pytest

from convert.__main__ import main as convert
from glm5_jax.__main__ import main
from glm5_jax.models import SHIPPED, shipped

TINY = shipped("tiny")
PROMPTS = ["import os\n", "class Reader:\n    def ", "def parse(self, text):\n"]


def test_a_model_is_published_whole_with_all_that_texts_and_chats_need(capsys):
    assert SHIPPED == ("tiny",)
    files = {path.name: path.stat().st_size for path in TINY.iterdir()}
    assert files.keys() >= {"README.md", "config.json", "model.safetensors", "tokenizer.json"}
    assert files.keys() >= {"tokenizer_config.json", "chat_template.jinja", "losses.png"}
    assert sum(files.values()) <= 8_000_000
    assert convert(["check", str(TINY)]) == 0
    assert "4 layers and 1 for multi-token prediction" in capsys.readouterr().out


def generated(tmp_path, capsys, *options):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    arguments = ["generate", "--model", "tiny", "--prompts", str(prompts), "--json"]
    assert main([*arguments, "--max-new-tokens", "80", *options]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_it_goes_on_with_code_that_can_be_read(tmp_path, capsys):
    """Most of the lines that it makes are Python, each by itself."""
    sampled = generated(tmp_path, capsys, "--temperature", "0.7", "--seed", "1")
    texts = [prompt + record["text"] for prompt, record in zip(PROMPTS, sampled, strict=True)]
    lines = [line.strip() for text in texts for line in text.splitlines()[:-1] if line.strip()]
    assert len(lines) >= 15
    assert sum(map(_is_python, lines)) >= 0.6 * len(lines), lines


def test_its_drafts_are_often_right_and_change_no_text(tmp_path, capsys):
    plain, drafted = (generated(tmp_path, capsys, "--draft-tokens", n) for n in ("0", "3"))
    assert [record["tokens"] for record in drafted] == [record["tokens"] for record in plain]
    steps = sum(record["work"]["main_steps"] for record in drafted)
    assert steps < 0.8 * sum(len(record["tokens"]) for record in drafted)


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert main(["generate", "--model", "tiny", "--prompt", "x"]) == 2
    assert "tiny: has no config.json" in capsys.readouterr().err


def _is_python(line):
    for rest in ("", "\n    pass", '"""'):
        try:
            ast.parse(line + rest)
        except (SyntaxError, ValueError):
            continue
        return True
    return False


@pytest.mark.parametrize("command", ["score", "eval", "chat", "serve"])
def test_every_command_names_it(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert "or a model that comes along: tiny" in " ".join(capsys.readouterr().out.split())
