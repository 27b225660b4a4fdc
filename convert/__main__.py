"""The `glm5-convert` command."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from convert.arguments import add_bounds, add_effort, effort_of, portion, setting, size
from glm5_jax.commands.arguments import integer
from glm5_jax.console import add_command, command_parser, run_command
from glm5_jax.errors import InputError

if TYPE_CHECKING:
    from convert.conversion import Converted, Outline
    from convert.quantize import Quantized

_GOES_ON = (
    "DST appears when all of it is there. Until then, what is done is kept beside it, and the\n"
    "same command goes on with that. Processes that share a file system can share the work."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a conversion leaves accelerators to others
    parser, commands = command_parser(
        "glm5-convert", "Converts GLM-5 checkpoints between the published layout and ours."
    )
    command = add_command(
        commands,
        "from-hf",
        _from_hf,
        "Convert a published checkpoint to a native one.\n\n"
        "Tensors keep their dtypes, and converting back gives the same bytes. Float8 weights are\n"
        "multiplied by their scales, unless they are to be kept.\n\n" + _GOES_ON,
    )
    command.add_argument("source", type=Path, metavar="SRC", help="published directory")
    command.add_argument("destination", type=Path, metavar="DST", help="must not exist")
    command.add_argument(
        "--float8-as",
        choices=["float8", "bfloat16", "float32"],
        help="how to keep weights that are published as float8: as they are, with their scales, or "
        "multiplied out (default: to the dtype in config.json)",
    )
    command.add_argument(
        "--strict",
        action="store_true",
        help="make nothing of weights some of which are NaN or infinite, which are named anyway",
    )
    add_effort(command)
    command = add_command(
        commands,
        "to-hf",
        _to_hf,
        "Convert a native checkpoint to the published layout.\n\n" + _GOES_ON,
    )
    command.add_argument("source", type=Path, metavar="SRC", help="native checkpoint")
    command.add_argument("destination", type=Path, metavar="DST", help="must not exist")
    command.add_argument(
        "--shard-size", type=size, default="5GB", metavar="SIZE", help="largest file"
    )
    command.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        help="round weights to it, but for router biases (default: as they are)",
    )
    add_effort(command)
    command = add_command(
        commands,
        "quantize",
        _quantize,
        "Round the weights of a native checkpoint to few bits.\n\n"
        "Matrices become float8 with a scale for each block of 128 x 128, int8 with one for each\n"
        "row, or, of routed experts only, int4 with one for 128 columns of a row. Embedding, head\n"
        "and routers stay as they are. The model computes from them as they lie in memory; the\n"
        "error that rounding makes is told of every kind of tensor.\n\n" + _GOES_ON,
    )
    command.add_argument("source", type=Path, metavar="SRC", help="native checkpoint")
    command.add_argument("destination", type=Path, metavar="DST", help="must not exist")
    command.add_argument("--to", choices=["float8", "int8", "int4"], required=True)
    add_effort(command)
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
    command = add_command(
        commands,
        "verify",
        _verify,
        "Read a checkpoint again and prove it.\n\n"
        "Every chunk of a native one, and every file of one that to-hf made, is compared with its\n"
        "SHA-256; with --against, every value with the checkpoint that it was made of.",
    )
    command.add_argument("directory", type=Path, metavar="DST", help="of either layout")
    command.add_argument("--against", type=Path, metavar="SRC", help="what it was made of")
    command.add_argument(
        "--sample",
        type=portion,
        default=1.0,
        metavar="SHARE",
        help="the share to look at, chosen at random, such as 0.01",
    )
    command.add_argument(
        "--seed", type=integer(0), default=0, metavar="N", help="of what --sample chooses"
    )
    add_bounds(command)
    command = add_command(
        commands,
        "synthesize",
        _synthesize,
        "Write a checkpoint of made-up weights in the published layout.\n\n"
        "Its names, shapes, dtypes and files are those of a published one: converting it shows\n"
        "what time, memory and disk a conversion takes.",
    )
    command.add_argument("destination", type=Path, metavar="DST", help="must not exist")
    command.add_argument(
        "--config", default="glm-5", metavar="PRESET", help="a preset, or a config.json"
    )
    command.add_argument(
        "--set",
        action="append",
        type=setting,
        default=[],
        metavar="KEY=VALUE",
        help="change a key of the config, such as hidden_size=2048; may be repeated",
    )
    command.add_argument("--float8", action="store_true", help="matrices in float8, with scales")
    command.add_argument(
        "--holes",
        action="store_true",
        help="headers alone: weights read as zeros and take no space on the disk",
    )
    command.add_argument(
        "--shard-size", type=size, default="5GiB", metavar="SIZE", help="largest file"
    )
    return run_command(parser, arguments)


def _require_directory(path: Path) -> None:
    if not path.is_dir():
        raise InputError(f"{path}: is not a directory, expected one with a checkpoint")


def _require_native(path: Path) -> None:
    from glm5_jax.checkpoint import PARAMS_NAME, is_native

    _require_directory(path)
    if not is_native(path):
        raise InputError(f"{path}: has no {PARAMS_NAME}, expected a native checkpoint")


def _from_hf(args: argparse.Namespace) -> int:
    from convert.conversion import check_destination
    from convert.native_layout import FLOAT8
    from convert.to_native import from_published, outline
    from glm5_jax.checkpoint import is_native

    _require_directory(args.source)
    if is_native(args.source):
        raise InputError(f"{args.source}: is a native checkpoint, expected a published directory")
    float8_as = FLOAT8.kind if args.float8_as == "float8" else args.float8_as
    if args.plan:
        check_destination(args.destination, args.source)
        return _print_plan(args, outline(args.source, float8_as))
    _tell(args, from_published(args.source, args.destination, float8_as, effort_of(args)))
    return 0


def _to_hf(args: argparse.Namespace) -> int:
    from convert.conversion import check_destination
    from convert.to_published import outline, to_published

    _require_native(args.source)
    if args.plan:
        check_destination(args.destination, args.source)
        return _print_plan(args, outline(args.source, args.shard_size, args.dtype))
    done = to_published(args.source, args.destination, args.shard_size, args.dtype, effort_of(args))
    _tell(args, done)
    return 0


def _quantize(args: argparse.Namespace) -> int:
    from convert.conversion import check_destination
    from convert.quantize import error_lines, outline, quantize

    _require_native(args.source)
    if args.plan:
        check_destination(args.destination, args.source)
        return _print_plan(args, outline(args.source, args.to))
    done = quantize(args.source, args.destination, args.to, effort_of(args))
    for tensors, error in error_lines(done.errors if done else {}):
        print(f"{tensors}: {error}")
    _tell(args, done)
    return 0


def _print_plan(args: argparse.Namespace, outline: "Outline") -> int:
    for line in outline.lines(args.destination, effort_of(args)):
        print(line)
    return 0


def _tell(args: argparse.Namespace, done: "Converted | Quantized | None") -> None:
    if done is None and args.destination.exists():
        print(f"{args.destination}: this process has done its share, and another one has made it")
    elif done is None:
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
    dtypes = sorted({source.kind(name) for name in tensors})
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


def _verify(args: argparse.Namespace) -> int:
    from convert.verify import verify

    for path in filter(None, (args.directory, args.against)):
        _require_directory(path)
    found = verify(args.directory, args.against, args.sample, args.seed, effort_of(args))
    tensors = f"{found.num_tensors} tensors" if found.num_tensors else ""
    files = f"{found.num_files} files" if found.num_files else ""
    looked = " and ".join(filter(None, (tensors, files)))
    versus = f", against {args.against}" if args.against else ""
    print(f"{args.directory}: sound; {looked}, {found.num_bytes:,} bytes were read{versus}")
    return 0


def _synthesize(args: argparse.Namespace) -> int:
    from convert.synthetic import synthesize
    from glm5_jax.config_json import read_config
    from glm5_jax.presets import load_preset

    path = Path(args.config)
    raw = (read_config(path) if path.suffix == ".json" else load_preset(args.config)).raw
    num_bytes = synthesize(
        args.destination,
        raw | dict(args.set),
        args.shard_size,
        float8=args.float8,
        holes=args.holes,
    )
    print(f"{args.destination}: {num_bytes:,} bytes of weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
