"""`from-hf`, `to-hf` and `quantize`, which make one checkpoint of another."""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.arguments import (
    add_effort,
    add_subset,
    effort_of,
    on_disk,
    require_directory,
    size,
    source,
    subset_of,
)
from glm5_jax.console import add_command
from glm5_jax.errors import InputError
from glm5_jax.processes import one_program

if TYPE_CHECKING:
    from convert.conversion import Converted, Effort, Outline
    from convert.quantize import Quantized

_GOES_ON = (
    "DST appears when all of it is there. Until then, what is done is kept beside it, and the\n"
    "same command goes on with that. Processes that share a file system can share the work."
)


def add(commands: Any) -> None:
    """Adds the commands."""
    command = add_command(
        commands,
        "from-hf",
        _from_hf,
        "Convert a published checkpoint to a native one.\n\n"
        "Tensors keep their dtypes, and converting back gives the same bytes. Float8 weights are\n"
        "multiplied by their scales, unless they are to be kept. With --layers and --experts, a\n"
        "small model is made of a part of a large one; only that is read.\n\n" + _GOES_ON,
    )
    command.add_argument(
        "source",
        type=source,
        metavar="SRC",
        help="published directory, or the URL of one: gs://, s3://, hf://OWNER/MODEL@REVISION, "
        "https://; it is read in parts, and no copy is made of it",
    )
    command.add_argument("destination", type=on_disk, metavar="DST", help="must not exist")
    command.add_argument(
        "--float8-as",
        choices=["float8", "bfloat16", "float32"],
        help="how to keep weights that are published as float8: as they are, with their scales, or "
        "multiplied out (default: to the dtype in config.json)",
    )
    _add_strict(command)
    command.add_argument(
        "--delete-source-shards",
        action="store_true",
        help="delete every shard of SRC as soon as all of it is converted, for a disk that cannot "
        "hold both; in the Hugging Face cache, its blob as well",
    )
    add_subset(command)
    add_effort(command)
    command = add_command(
        commands,
        "to-hf",
        _to_hf,
        "Convert a native checkpoint to the published layout.\n\n" + _GOES_ON,
    )
    command.add_argument("source", type=on_disk, metavar="SRC", help="native checkpoint")
    command.add_argument("destination", type=on_disk, metavar="DST", help="must not exist")
    command.add_argument(
        "--shard-size", type=size, default="5GB", metavar="SIZE", help="most weights of a file"
    )
    command.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        help="round weights to it, but for router biases (default: as they are)",
    )
    _add_strict(command)
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
    command.add_argument("source", type=on_disk, metavar="SRC", help="native checkpoint")
    command.add_argument("destination", type=on_disk, metavar="DST", help="must not exist")
    command.add_argument("--to", choices=["float8", "int8", "int4"], required=True)
    add_effort(command)


def _add_strict(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--strict",
        action="store_true",
        help="make nothing of weights some of which are NaN or infinite, which are named anyway",
    )


def _from_hf(args: argparse.Namespace) -> int:
    from convert.conversion import check_destination
    from convert.native_layout import FLOAT8
    from convert.to_native import from_published, outline
    from glm5_jax.checkpoint import is_native

    require_directory(args.source)
    if is_native(args.source):
        raise InputError(f"{args.source}: is a native checkpoint, expected a published directory")
    float8_as = FLOAT8.kind if args.float8_as == "float8" else args.float8_as
    if args.plan:
        check_destination(args.destination, args.source)
        effort, subset = effort_of(args), subset_of(args)
        return _print_plan(args, outline(args.source, args.destination, float8_as, effort, subset))

    def make(effort: "Effort") -> "Converted | None":
        return from_published(args.source, args.destination, float8_as, effort, subset_of(args))

    return _make(args, make)


def _to_hf(args: argparse.Namespace) -> int:
    from convert.conversion import check_destination
    from convert.to_published import outline, to_published

    _require_native(args.source)
    if args.plan:
        check_destination(args.destination, args.source)
        return _print_plan(args, outline(args.source, args.shard_size, args.dtype))

    def make(effort: "Effort") -> "Converted | None":
        return to_published(args.source, args.destination, args.shard_size, args.dtype, effort)

    return _make(args, make)


def _quantize(args: argparse.Namespace) -> int:
    from convert.conversion import check_destination
    from convert.quantize import outline, quantize

    _require_native(args.source)
    if args.plan:
        check_destination(args.destination, args.source)
        return _print_plan(args, outline(args.source, args.to))

    def make(effort: "Effort") -> "Quantized | None":
        return quantize(args.source, args.destination, args.to, effort)

    return _make(args, make)


def _require_native(path: Path) -> None:
    from glm5_jax.checkpoint import PARAMS_NAME, is_native

    require_directory(path)
    if not is_native(path):
        raise InputError(f"{path}: has no {PARAMS_NAME}, expected a native checkpoint")


def _print_plan(args: argparse.Namespace, outline: "Outline") -> int:
    for line in outline.lines(args.destination, effort_of(args)):
        print(line)
    return 0


def _make(
    args: argparse.Namespace, make: "Callable[[Effort], Converted | Quantized | None]"
) -> int:
    """Makes a checkpoint, in one process or several, and tells what was made."""
    from glm5_jax.coordination import LONGEST, said_by_all

    with one_program(args):
        done = make(effort_of(args))
        told = "" if done is None else "\n".join(_lines(args, done))
        made = [text for text in said_by_all("what was made", told, LONGEST) if text]
        if made:
            print(made[0])
        elif args.destination.exists():
            print(f"{args.destination}: this process has done its share, and another has made it")
        else:
            print(f"{args.destination}: this process has done its share, and others have not yet")
    return 0


def _lines(args: argparse.Namespace, done: "Converted | Quantized") -> Iterator[str]:
    from convert.quantize import Quantized, error_lines

    if isinstance(done, Quantized):
        for tensors, error in error_lines(done.errors):
            yield f"{tensors}: relative error {error}"
        rounded = f"{len(done.errors)} of them in {args.to}"
        yield f"{args.destination}: {done.num_tensors} tensors, {rounded}, {done.num_bytes:,} bytes"
        return
    yield f"{args.destination}: {done.num_tensors} tensors, {done.num_bytes:,} bytes"
    if done.num_deleted:
        yield (
            f"{args.source}: {done.num_deleted} shards were deleted, for {args.destination} has "
            "what they held; the other files stay"
        )
