import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from convert.__main__ import main as glm5_convert
from glm5_jax import console
from glm5_jax.__main__ import main as glm5
from tests.tiny import TINY, random_weights, write_published


@pytest.fixture
def terminal(monkeypatch):
    """Makes rich take standard error for a terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")


def test_commands_draw_their_bars(terminal, tmp_path, capsys):
    source = write_published(tmp_path / "source", TINY, random_weights(TINY))
    np.save(tmp_path / "tokens.npy", np.arange(2, 14))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt_tokens": [5, 7]}\n{"prompt_tokens": [9]}\n')
    native, back = tmp_path / "native", tmp_path / "back"
    score = ["--tokens", tmp_path / "tokens.npy", "--out", tmp_path / "scores.npz"]
    for command, arguments in (
        (glm5_convert, ["from-hf", source, native]),
        (glm5_convert, ["to-hf", native, back]),
        (glm5_convert, ["diff", source, back]),
        (glm5, ["score", "--model", native, *score]),
        (glm5, ["generate", "--model", native, "--prompts", prompts, "--max-new-tokens", "2"]),
    ):
        assert command([str(argument) for argument in arguments]) == 0
        assert arguments[0] in capsys.readouterr().err


def test_a_bar_shows_its_fields_from_the_start(terminal, capsys):
    from rich.progress import TextColumn

    column = TextColumn("{task.fields[done]} of them")
    with console.progress("work", 3, column, done=0) as advance:
        advance(1, done=1)
    assert "1 of them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "is_told"),
    [("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.", True), ("INTERNAL: x", False)],
)
def test_memory_that_does_not_do_is_one_line(capsys, text, is_told):
    def run(_):
        raise jax.errors.JaxRuntimeError(text)

    parser, commands = console.command_parser("glm5", "Does.")
    console.add_command(commands, "work", run, "Works.")
    if not is_told:
        with pytest.raises(jax.errors.JaxRuntimeError):
            console.run_command(parser, ["work"])
        return
    assert console.run_command(parser, ["work"]) == 2
    expected = "glm5: error: Out of memory allocating 5 bytes; expected a model, batch and length"
    error = capsys.readouterr().err
    assert error.startswith(expected) and error.count("\n") == 1


def test_work_goes_on_if_nobody_reads_what_it_tells(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as nobody:
        monkeypatch.setattr("sys.stderr", nobody)
        console.notice("step 1")
        console.notice("step 2")
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_command_told_to_end_removes_what_is_half_written(tmp_path, number, status):
    program = f"""
import pathlib, sys, time
from glm5_jax import atomic, console

def work(args):
    with atomic.new_directory(pathlib.Path({str(tmp_path / "out")!r})) as folder:
        (folder / "part").touch()
        print("ready", flush=True)
        time.sleep(60)

parser, commands = console.command_parser("tool", "Works.")
console.add_command(commands, "work", work, "Work.")
sys.exit(console.run_command(parser, ["work"]))
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, error = process.communicate()
    assert process.returncode == status and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []
