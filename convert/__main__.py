"""The `glm5-convert` command."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from glm5_jax.commands.arguments import integer
from glm5_jax.console import add_command, command_parser, run_command
from glm5_jax.errors import InputError

if TYPE_CHECKING:
    from convert.conversion import Converted, Effort

_GOES_ON = (
    "DST appears when all of it is there. Until then, what is done is kept beside it, and the\n"
    "same command goes on with that. Processes that share a file system can share the work."
)
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
        "multiplied by their scales.\n\n" + _GOES_ON,
    )
    command.add_argument("source", type=Path, metavar="SRC", help="published directory")
    command.add_argument("destination", type=Path, metavar="DST", help="must not exist")
    command.add_argument(
        "--float8-as",
        choices=["bfloat16", "float32"],
        help="dtype of weights that are published as float8 (default: the dtype in config.json)",
    )
    _add_effort(command)
    command = add_command(
        commands,
        "to-hf",
        _to_hf,
        "Convert a native checkpoint to the published layout.\n\n" + _GOES_ON,
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
    _add_effort(command)
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


def _add_effort(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--memory",
        type=_size,
        metavar="SIZE",
        help="most that weights on their way may take, such as 4GiB (default: a quarter of what "
        "the machine has)",
    )
    command.add_argument(
        "--threads",
        type=integer(1, 1024),
        metavar="N",
        help="shards, and chunks, that are worked on at a time (default: as many as processors)",
    )
    command.add_argument(
        "--process",
        type=_share,
        default="0/1",
        metavar="I/N",
        help="do the share I, from 0, of N processes; the last one to end makes DST",
    )
    command.add_argument(
        "--restart", action="store_true", help="throw away what is done and begin anew"
    )


def _effort(args: argparse.Namespace) -> "Effort":
    from convert.conversion import Effort, quarter_of_memory
    from convert.workspace import Share

    return Effort(
        memory=args.memory or quarter_of_memory(),
        num_threads=args.threads or os.cpu_count() or 1,
        share=Share(*args.process),
        restart=args.restart,
    )


def _share(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(f"is {text!r:.80}, expected I/N such as 0/4, I below N")
    return int(match[1]), int(match[2])


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d{1,18})\s*(?:([KMGT]?)B?|([KMGT])IB)", text.strip().upper())
    size = 0
    if match:
        size = int(match[1]) * (
            1024 ** (1 + "KMGT".index(match[3])) if match[3] else _UNITS[match[2]]
        )
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size, expected one like 5GB")
    return size


def _require_directory(path: Path) -> None:
    if not path.is_dir():
        raise InputError(f"{path}: is not a directory, expected one with a checkpoint")


def _from_hf(args: argparse.Namespace) -> int:
    from convert.to_native import from_published
    from glm5_jax.checkpoint import is_native

    _require_directory(args.source)
    if is_native(args.source):
        raise InputError(f"{args.source}: is a native checkpoint, expected a published directory")
    _tell(args, from_published(args.source, args.destination, args.float8_as, _effort(args)))
    return 0


def _to_hf(args: argparse.Namespace) -> int:
    from convert.to_published import to_published
    from glm5_jax.checkpoint import PARAMS_NAME, is_native

    _require_directory(args.source)
    if not is_native(args.source):
        raise InputError(f"{args.source}: has no {PARAMS_NAME}, expected a native checkpoint")
    done = to_published(args.source, args.destination, args.shard_size, args.dtype, _effort(args))
    _tell(args, done)
    return 0


def _tell(args: argparse.Namespace, done: "Converted | None") -> None:
    if done is None:
        print(f"{args.destination}: this process has done its share, and others have not yet")
    else:
        print(f"{args.destination}: {done.num_tensors} tensors, {done.num_bytes:,} bytes")


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
