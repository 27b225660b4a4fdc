"""`check`, `diff` and `verify`, which read checkpoints and change nothing."""

import argparse
from typing import Any

from convert.arguments import (
    add_bounds,
    add_subset,
    effort_of,
    on_disk,
    portion,
    require_directory,
    source,
    subset_of,
)
from glm5_jax.commands.arguments import integer
from glm5_jax.console import add_command

_EITHER = "checkpoint of either layout; a published one may be a URL"


def add(commands: Any) -> None:
    """Adds the commands."""
    command = add_command(
        commands,
        "check",
        _check,
        "Compare a checkpoint's names, shapes and dtypes with its config.\n\n"
        "Only headers are read.",
    )
    command.add_argument("source", type=source, metavar="SRC", help=_EITHER)
    command = add_command(
        commands,
        "diff",
        _diff,
        "Compare two checkpoints tensor by tensor, in either layout.\n\n"
        "The exit status is 0 if they are equal and 1 if they differ.",
    )
    command.add_argument("first", type=source, metavar="A", help=_EITHER)
    command.add_argument("second", type=source, metavar="B", help="another")
    command = add_command(
        commands,
        "verify",
        _verify,
        "Read a checkpoint again and prove it.\n\n"
        "Every chunk of a native one, and every file of one that to-hf made, is compared with its\n"
        "SHA-256; with --against, every value with the checkpoint that it was made of.",
    )
    command.add_argument("directory", type=on_disk, metavar="DST", help="of either layout")
    command.add_argument("--against", type=source, metavar="SRC", help="what it was made of")
    add_subset(command)
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


def _check(args: argparse.Namespace) -> int:
    from convert.conversion import report
    from convert.diff import open_source

    require_directory(args.source)
    opened = open_source(args.source)
    report(opened)
    tensors = opened.tensors()
    dtypes = sorted({opened.kind(name) for name in tensors})
    layers, mtp = opened.config.num_layers, opened.config.num_mtp_layers
    print(
        f"{args.source}: {len(tensors)} tensors as expected, of {', '.join(dtypes)}; "
        f"{layers} layers and {mtp} for multi-token prediction"
    )
    opened.close()
    return 0


def _diff(args: argparse.Namespace) -> int:
    from convert.diff import compare

    for path in (args.first, args.second):
        require_directory(path)
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
        require_directory(path)
    effort, subset = effort_of(args), subset_of(args)
    found = verify(args.directory, args.against, args.sample, args.seed, effort, subset)
    tensors = f"{found.num_tensors} tensors" if found.num_tensors else ""
    files = f"{found.num_files} files" if found.num_files else ""
    looked = " and ".join(filter(None, (tensors, files)))
    versus = f", against {args.against}" if args.against else ""
    print(f"{args.directory}: sound; {looked}, {found.num_bytes:,} bytes were read{versus}")
    return 0
