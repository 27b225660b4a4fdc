"""`glm5 info`: what can be said of a model from its config."""

import argparse
import json
from pathlib import Path
from typing import Any

from glm5_jax.commands.arguments import report_unknown_keys
from glm5_jax.console import add_command
from glm5_jax.errors import InputError


def add(commands: Any) -> None:
    """Adds the command."""
    command = add_command(
        commands, "info", _run, "Show the sizes of a model: layers, parameters, memory."
    )
    command.add_argument("model", metavar="MODEL_OR_PRESET", help="a checkpoint or a preset's name")
    command.add_argument("--json", action="store_true", help="print one JSON object")


def _run(args: argparse.Namespace) -> int:
    from glm5_jax.info import describe, format_description
    from glm5_jax.load import read_model_config
    from glm5_jax.presets import PRESETS, load_preset

    directory = Path(args.model)
    if directory.is_dir():
        published = read_model_config(directory)
        report_unknown_keys(directory, published.unknown_keys)
    elif args.model in PRESETS:
        published = load_preset(args.model)
    else:
        raise InputError(
            f"{args.model}: is neither a directory nor one of the presets {', '.join(PRESETS)}"
        )
    facts = describe(published.config)
    print(json.dumps(facts) if args.json else format_description(args.model, facts))
    return 0
