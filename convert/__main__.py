"""The `glm5-convert` command."""

import os
import sys
from collections.abc import Sequence

from convert.commands import comparisons, conversions, synthesize
from glm5_jax.console import command_parser, run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a conversion leaves accelerators to others
    parser, commands = command_parser(
        "glm5-convert", "Converts GLM-5 checkpoints between the published layout and ours."
    )
    for group in (conversions, comparisons, synthesize):
        group.add(commands)
    return run_command(parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
