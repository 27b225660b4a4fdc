"""The `glm5-train` command."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from glm5_jax.commands.arguments import add_mesh, integer, non_negative, partition_for
from glm5_jax.console import add_command, command_parser, run_command
from glm5_jax.errors import InputError
from glm5_jax.processes import add_processes, one_program
from train.prepare import add_prepare
from train.settings import Settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser, commands = command_parser("glm5-train", "Pretrains small GLM-5 models.")
    add_prepare(commands)
    _add_run(commands)
    command = add_command(
        commands, "report", _report, "Draw the losses of a run and sum it up in a few lines."
    )
    command.add_argument("run_directory", type=Path, metavar="RUN", help="made by `glm5-train run`")
    return run_command(parser, arguments)


def _add_run(commands: Any) -> None:
    fields = dataclasses.fields(Settings)
    may_change = ", ".join(_option(field) for field in fields if field.metadata["may_change"])
    command = add_command(
        commands,
        "run",
        _run,
        "Train a model, or go on training it.\n\n"
        "A run goes on, from its last checkpoint, with the settings it was started with; only\n"
        f"{may_change} may change.\n\n"
        "Checkpoints in RUN are native model directories: `glm5 --model RUN/step-N`.",
    )
    command.add_argument("data", type=Path, metavar="DATA", help="made by `glm5-train prepare`")
    command.add_argument(
        "run_directory", type=Path, metavar="RUN", help="new, or one to go on with"
    )
    command.add_argument(
        "--config", required=True, metavar="PRESET|FILE", help="a preset's name or a config.json"
    )
    command.add_argument(
        "--from",
        type=Path,
        dest="initial",
        metavar="DIR",
        help="a native checkpoint whose weights a new run starts with, such as the last one of a "
        "run of another stage (default: random weights)",
    )
    add_mesh(command)
    add_processes(command)
    types: dict[type, tuple[Callable[[str], float], str]] = {
        int: (integer(0), "N"),
        float: (non_negative, "X"),
    }
    for field in fields:
        option, meaning = _option(field), field.metadata["help"]
        choices = field.metadata["choices"]
        if isinstance(field.default, bool):
            command.add_argument(option, action="store_true", help=meaning)
        elif choices is not None:
            command.add_argument(option, choices=choices, default=field.default, help=meaning)
        else:
            parse, metavar = types[type(field.default)]
            command.add_argument(
                option, type=parse, default=field.default, metavar=metavar, help=meaning
            )


def _option(field: "dataclasses.Field[Any]") -> str:
    return f"--{field.name.replace('_', '-')}"


def _run(args: argparse.Namespace) -> int:
    with one_program(args):
        _train(args)
    return 0


def _train(args: argparse.Namespace) -> None:
    settings = Settings(
        **{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)}
    )

    from glm5_jax.config_json import read_config
    from glm5_jax.presets import PRESETS, load_preset
    from train.data import Data
    from train.run import train

    is_preset, path = args.config in PRESETS, Path(args.config)
    if not is_preset and not path.exists():
        raise InputError(f"{path}: is neither a file nor one of the presets {', '.join(PRESETS)}")
    published = load_preset(args.config) if is_preset else read_config(path)
    data = Data(args.data)
    partition = partition_for(published.config, args.mesh, "train", settings.batch_size)
    last = train(data, published.config, args.run_directory, settings, partition, args.initial)
    print(f"{last}: trained for {settings.steps} steps")


def _report(args: argparse.Namespace) -> int:
    from train.report import report

    print(report(args.run_directory))
    return 0


if __name__ == "__main__":
    sys.exit(main())
