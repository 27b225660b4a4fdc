"""The `glm5` command."""

import sys
from collections.abc import Sequence

from glm5_jax.commands import chat, doctor, evaluate, generate, info, plan, score, serve
from glm5_jax.console import command_parser, run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser, commands = command_parser("glm5", "Runs GLM-5 models.")
    for command in (info, plan, doctor, score, generate, chat, serve, evaluate):
        command.add(commands)
    return run_command(parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
