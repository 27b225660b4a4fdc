"""The `glm5-train` command."""

import argparse
import dataclasses
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from glm5_jax.commands.arguments import add_mesh, integer, non_negative, partition_for
from glm5_jax.console import add_command, command_parser, run_command
from glm5_jax.processes import add_processes, one_program
from train.planning import add_plan
from train.prepare import add_prepare
from train.run_file import READY, RunFile, config_of, make_settings, read_run_file
from train.settings import Settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser, commands = command_parser("glm5-train", "Pretrains small GLM-5 models.")
    add_prepare(commands)
    add_plan(commands)
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
        "The same command again goes on from the last checkpoint; only\n"
        f"{textwrap.fill(may_change, 90)} may change.\n"
        "SIGTERM and Ctrl-C end a run after the step it is at, which is saved.\n\n"
        "Settings are those of a run file, if one is given, whose stages follow one another; then\n"
        "those of options, which hold in all stages; else the defaults.\n\n"
        "Checkpoints in RUN are native model directories: `glm5 generate --model RUN/step-N`,\n"
        "and `glm5-convert to-hf RUN/step-N` publishes them.",
    )
    command.add_argument("data", type=Path, metavar="DATA", help="made by `glm5-train prepare`")
    command.add_argument(
        "run_directory", type=Path, metavar="RUN", help="new, or one to go on with"
    )
    command.add_argument(
        "--file",
        metavar="NAME|FILE",
        help=f"a run file in TOML, or one of the ready ones: {', '.join(READY)}",
    )
    command.add_argument(
        "--config",
        metavar="PRESET|FILE",
        help="a preset's name or a config.json (default: that of the run file)",
    )
    command.add_argument(
        "--from",
        type=Path,
        dest="initial",
        metavar="DIR",
        help="a native checkpoint whose weights a new run starts with, such as the last one of a "
        "run of another stage (default: random weights)",
    )
    command.add_argument(
        "--accept-changes",
        action="store_true",
        help="go on although config, settings or data are not those the run was started with",
    )
    add_mesh(command)
    add_processes(command)
    group = command.add_argument_group("settings", "Run files have the same, with _ for -.")
    types: dict[type, tuple[Callable[[str], Any], str]] = {
        int: (integer(0), "N"),
        float: (non_negative, "X"),
        str: (str, "TEXT"),
    }
    for field in fields:
        default = f"(default: {field.default or repr(field.default)})"
        if isinstance(field.default, bool):
            group.add_argument(
                _option(field),
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=f"{field.metadata['help']} {default}",
            )
            continue
        choices = field.metadata["choices"]
        parse, metavar = types[type(field.default)]
        group.add_argument(
            _option(field),
            type=parse,
            choices=choices,
            default=argparse.SUPPRESS,  # so that only what is given is known
            metavar=None if choices else metavar,
            help=f"{field.metadata['help']} {default}",
        )


def _option(field: "dataclasses.Field[Any]") -> str:
    return f"--{field.name.replace('_', '-')}"


def _run(args: argparse.Namespace) -> int:
    with one_program(args):
        return _train(args)


def _train(args: argparse.Namespace) -> int:
    """Trains; returns the exit status."""
    given = vars(args)
    file = RunFile(None, ({},)) if args.file is None else read_run_file(args.file)
    options = {field.name for field in dataclasses.fields(Settings)} & given.keys()
    stages = make_settings(file.stages, {name: given[name] for name in options})
    from train.data import Data
    from train.fit import common_batch
    from train.run import train

    published = config_of(args.config or file.config)
    data = Data(args.data)
    partition = partition_for(published.config, args.mesh, "train", common_batch(stages))
    ended = train(
        data,
        published.config,
        args.run_directory,
        stages,
        partition,
        args.initial,
        accept_changes=args.accept_changes,
    )
    steps = sum(settings.steps for settings in stages)
    if ended.signal is None:
        print(f"{ended.checkpoint}: trained for {steps} steps")
        return 0
    print(
        f"{ended.checkpoint}: stopped by {ended.signal.name} after {ended.step} of {steps} steps; "
        "the same command goes on from there"
    )
    # Whoever terminates a job wants it to end well; an interrupted one is not to be followed.
    return 0 if ended.signal == signal.SIGTERM else 128 + ended.signal


def _report(args: argparse.Namespace) -> int:
    from train.report import report

    print(report(args.run_directory))
    return 0


if __name__ == "__main__":
    sys.exit(main())
