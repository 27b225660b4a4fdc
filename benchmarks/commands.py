"""The project's commands, run as a user would type them."""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from glm5_jax.models import shipped

NAMES = {"glm5_jax": "glm5", "train": "glm5-train", "convert": "glm5-convert"}


def run_command(module: str, *arguments: object) -> str:
    """Runs a command; returns what it printed, having shown it.

    Args:
      module: one of `NAMES`.

    Raises:
      SystemExit: it failed.
    """
    command, words = NAMES[module], [str(argument) for argument in arguments]
    print(f"\n$ {command} {shlex.join(words)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", module, *words], stdout=subprocess.PIPE, text=True, check=False
    )
    print(done.stdout, end="", flush=True)
    if done.returncode:
        sys.exit(f"{command} {words[0]} ended with status {done.returncode}")
    return done.stdout


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds `--model` and `--data`: a trained model, and text as its tokenizer cuts it."""
    parser.add_argument(
        "--model", type=Path, default=shipped("tiny"), help="(the one that comes along)"
    )
    parser.add_argument(
        "--data", type=Path, default=Path("build/tiny-data"), help="prepared if it is not there"
    )


def prepare_for(model: Path, data: Path) -> None:
    """Tokenizes the Python standard library for a model, if that is not done."""
    if not data.exists():
        run_command("train", "prepare", data, "--tokenizer", model)
