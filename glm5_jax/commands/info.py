"""`glm5 info`: what can be said of a model from its config."""

import argparse
import json
from typing import Any

from glm5_jax.commands.arguments import read_config_of
from glm5_jax.console import add_command


def add(commands: Any) -> None:
    """Adds the command."""
    command = add_command(
        commands, "info", _run, "Show the sizes of a model: layers, parameters, memory."
    )
    command.add_argument("model", metavar="MODEL_OR_PRESET", help="a checkpoint or a preset's name")
    command.add_argument("--json", action="store_true", help="print one JSON object")


def _run(args: argparse.Namespace) -> int:
    from glm5_jax.info import describe, format_description

    facts = describe(read_config_of(args.model))
    print(json.dumps(facts) if args.json else format_description(args.model, facts))
    return 0
