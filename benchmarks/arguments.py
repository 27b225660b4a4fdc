"""What the command lines of benchmarks have in common."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from glm5_jax.commands.arguments import integer
from glm5_jax.console import Parser, exit_status

# The exit status where everything was measured and a goal is missed.
MISSED = 3


def parser(description: str | None, default_repeats: int | None = None) -> Parser:
    """With `--results`, and `--repeats` if it has a default."""
    made = Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    if default_repeats is not None:
        made.add_argument("--repeats", type=integer(1), default=default_repeats)
    made.add_argument("--results", type=_folder, help="folder to write JSON and Markdown to")
    return made


def _folder(text: str) -> Path:
    """The type of an argument that is a folder, there or to be made: told of before hours of work.

    Raises:
      argparse.ArgumentTypeError: it cannot be written to.
    """
    folder = Path(text)
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"is {text!r}, expected a folder that can be written to")
    return folder


def add_cores(made: Parser) -> None:
    """Adds `--cores`."""
    most = len(os.sched_getaffinity(0))
    made.add_argument("--cores", type=integer(1, most), default=most, help="how many to use")


def run(main: Callable[[], int]) -> None:
    """Ends the process with what `main` returns; with 2 and one line if it cannot be measured."""
    sys.exit(exit_status(Path(sys.argv[0]).stem, main))
