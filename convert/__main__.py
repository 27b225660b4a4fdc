"""The `glm5-convert` command."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from glm5_jax.console import add_command, command_parser, run_command
from glm5_jax.errors import InputError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser, commands = command_parser(
        "glm5-convert", "Converts GLM-5 checkpoints between the published layout and ours."
    )
    command = add_command(
        commands,
        "from-hf",
        _from_hf,
        "Convert a published checkpoint to a native one.\n\n"
        "Tensors keep their dtypes, and converting back gives the same bytes. Float8 weights are\n"
        "multiplied by their scales.",
    )
    command.add_argument("source", type=Path, metavar="SRC", help="published directory")
    command.add_argument("destination", type=Path, metavar="DST", help="must not exist")
    command.add_argument(
        "--float8-as",
        choices=["bfloat16", "float32"],
        help="dtype of weights that are published as float8 (default: the dtype in config.json)",
    )
    command = add_command(
        commands, "to-hf", _to_hf, "Convert a native checkpoint to the published layout."
    )
    command.add_argument("source", type=Path, metavar="SRC", help="native checkpoint")
    command.add_argument("destination", type=Path, metavar="DST", help="must not exist")
    command.add_argument(
        "--shard-size", type=_size, default="5GB", metavar="SIZE", help="largest file"
    )
    command.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        help="round weights to it, but for router biases (default: as they are)",
    )
    command = add_command(
        commands,
        "check",
        _check,
        "Compare a checkpoint's names, shapes and dtypes with its config.\n\n"
        "Only headers are read.",
    )
    command.add_argument("source", type=Path, metavar="SRC", help="checkpoint of either layout")
    command = add_command(
        commands,
        "diff",
        _diff,
        "Compare two checkpoints tensor by tensor, in either layout.\n\n"
        "The exit status is 0 if they are equal and 1 if they differ.",
    )
    command.add_argument("first", type=Path, metavar="A", help="checkpoint of either layout")
    command.add_argument("second", type=Path, metavar="B", help="another")
    return run_command(parser, arguments)


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+)\s*([KMGT]?)B?", text.upper())
    size = int(match[1]) * _UNITS[match[2]] if match else 0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size, expected one like 5GB")
    return size


def _require_directory(path: Path) -> None:
    if not path.is_dir():
        raise InputError(f"{path}: is not a directory, expected one with a checkpoint")


def _from_hf(args: argparse.Namespace) -> int:
    from convert.conversion import from_published
    from glm5_jax.checkpoint import is_native

    _require_directory(args.source)
    if is_native(args.source):
        raise InputError(f"{args.source}: is a native checkpoint, expected a published directory")
    done = from_published(args.source, args.destination, args.float8_as)
    print(f"{args.destination}: {done.num_tensors} tensors, {done.num_bytes:,} bytes")
    return 0


def _to_hf(args: argparse.Namespace) -> int:
    from convert.conversion import to_published
    from glm5_jax.checkpoint import PARAMS_NAME, is_native

    _require_directory(args.source)
    if not is_native(args.source):
        raise InputError(f"{args.source}: has no {PARAMS_NAME}, expected a native checkpoint")
    done = to_published(args.source, args.destination, args.shard_size, args.dtype)
    print(f"{args.destination}: {done.num_tensors} tensors, {done.num_bytes:,} bytes")
    return 0


def _check(args: argparse.Namespace) -> int:
    from convert.conversion import report
    from convert.diff import open_source

    _require_directory(args.source)
    source = open_source(args.source)
    report(source)
    tensors = source.tensors()
    dtypes = sorted({stored.dtype.name for stored in tensors.values()})
    layers, mtp = source.config.num_layers, source.config.num_mtp_layers
    print(
        f"{args.source}: {len(tensors)} tensors as expected, of {', '.join(dtypes)}; "
        f"{layers} layers and {mtp} for multi-token prediction"
    )
    source.close()
    return 0


def _diff(args: argparse.Namespace) -> int:
    from convert.diff import compare

    for path in (args.first, args.second):
        _require_directory(path)
    outcome = compare(args.first, args.second)
    for line in outcome.lines():
        print(line)
    print(
        f"{outcome.num_tensors} tensors in both, {len(outcome.differences)} differences, "
        f"largest between values {outcome.largest:.3g}"
    )
    return 1 if outcome.differences else 0


if __name__ == "__main__":
    sys.exit(main())
