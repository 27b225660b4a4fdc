"""Arguments of `glm5-convert` that several commands take, and their types."""

import argparse
import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING

from glm5_jax.commands.arguments import integer
from glm5_jax.errors import InputError
from glm5_jax.processes import add_processes

if TYPE_CHECKING:
    from convert.conversion import Effort
    from convert.workspace import Share
    from glm5_jax.published.subset import Subset
    from glm5_jax.remote import AnyPath

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def source(text: str) -> "AnyPath":
    """A directory to read: a path, or a URL."""
    from glm5_jax.remote import any_path

    try:
        return any_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def on_disk(text: str) -> Path:
    """A path on this machine."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"is {text!r:.80}, expected a path, and no URL")
    return Path(text)


def portion(text: str) -> float:
    """A share of a whole."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"is {text!r:.80}, expected above 0 and at most 1")
    return value


def share(text: str) -> tuple[int, int]:
    """The number of a process, and of how many."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(f"is {text!r:.80}, expected I/N such as 0/4, I below N")
    return int(match[1]), int(match[2])


def size(text: str) -> int:
    """A size in bytes, in units of 1000 (5GB) or of 1024 (5GiB)."""
    match = re.fullmatch(r"(\d{1,18})\s*(?:([KMGT]?)B?|([KMGT])IB)", text.strip().upper())
    size = 0
    if match:
        size = int(match[1]) * (
            1024 ** (1 + "KMGT".index(match[3])) if match[3] else _UNITS[match[2]]
        )
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size, expected one like 5GB")
    return size


def setting(text: str) -> tuple[str, object]:
    """A key and a value in JSON, where a word needs no quotes."""
    from glm5_jax.strict_json import parse_value

    key, equals, value = text.partition("=")
    try:
        return key, parse_value(value)
    except InputError:
        if key and equals and re.fullmatch(r"[\w.-]+", value):
            return key, value
    raise argparse.ArgumentTypeError(f"is {text!r:.80}, expected KEY=VALUE, VALUE in JSON")


def require_directory(path: "AnyPath") -> None:
    """Raises `InputError` if there is no such directory."""
    if not isinstance(path, Path):
        path.require_directory()
    elif not path.is_dir():
        raise InputError(f"{path}: is not a directory, expected one with a checkpoint")


def layers(text: str) -> tuple[int, ...]:
    """Numbers of layers, ascending, of a list of numbers and ranges such as 0-3,78."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part.strip())
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise argparse.ArgumentTypeError(f"is {text!r:.80}, expected layers such as 0-3,78")
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(found))


def add_subset(command: argparse.ArgumentParser) -> None:
    """Adds which part of a published checkpoint is meant."""
    command.add_argument(
        "--layers",
        type=layers,
        metavar="LIST",
        help="only these layers of SRC, such as 0-3,78; the number after its last layer is the one "
        "for multi-token prediction (default: all)",
    )
    command.add_argument(
        "--experts",
        type=integer(1),
        metavar="N",
        help="only the first N routed experts of each layer of SRC (default: all)",
    )


def subset_of(args: argparse.Namespace) -> "Subset":
    """What `add_subset` reads."""
    from glm5_jax.published.subset import Subset

    return Subset(args.layers, args.experts)


def add_bounds(command: argparse.ArgumentParser) -> None:
    """Adds what bounds a command's use of the machine."""
    command.add_argument(
        "--memory",
        type=size,
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


def add_effort(command: argparse.ArgumentParser) -> None:
    """Adds how a conversion is gone about."""
    add_bounds(command)
    command.add_argument(
        "--plan", action="store_true", help="say what would be read and written, and do nothing"
    )
    command.add_argument(
        "--process",
        type=share,
        metavar="I/N",
        help="do the share I, from 0, of N processes that do not know of each other; the last one "
        "to end makes DST",
    )
    command.add_argument(
        "--restart", action="store_true", help="throw away what is done and begin anew"
    )
    add_processes(command)


def effort_of(args: argparse.Namespace) -> "Effort":
    """What `add_bounds` and `add_effort` read.

    Raises:
      InputError: `--process` is given to processes that are connected.
    """
    from convert.conversion import DEFAULT_EFFORT

    given = {"memory": args.memory, "num_threads": args.threads}
    bounds = dataclasses.replace(
        DEFAULT_EFFORT, **{name: value for name, value in given.items() if value is not None}
    )
    if "process" not in args:  # nothing is shared
        return bounds
    return dataclasses.replace(
        bounds,
        share=_share(args),
        restart=args.restart,
        delete_source_shards=getattr(args, "delete_source_shards", False),
        strict=getattr(args, "strict", False),
    )


def _share(args: argparse.Namespace) -> "Share":
    import jax

    from convert.workspace import Share

    if not jax.distributed.is_initialized():
        return Share(*(args.process or (0, 1)))
    if args.process is not None:
        number, count = args.process
        raise InputError(
            f"--process is {number}/{count}, expected none: the {jax.process_count()} processes "
            "that are connected share the work"
        )
    return Share(jax.process_index(), jax.process_count())
