"""The command `glm5-train prepare`: text to tokens."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm5_jax.commands.arguments import integer, non_negative
from glm5_jax.console import add_command
from glm5_jax.errors import InputError

if TYPE_CHECKING:
    from train.corpus import File

_DEFAULT_SOURCE = "text"
_LIBRARY_SOURCE = "stdlib"


def add_prepare(commands: Any) -> None:
    """Adds the command to the others."""
    command = add_command(
        commands,
        "prepare",
        _prepare,
        "Tokenize text to train on.\n\n"
        "A file is a document, but of .jsonl, .jsonl.gz and .parquet every line or row is one.\n"
        "Without --text and --source, that is the source of the Python standard library.\n\n"
        "All sources get one tokenizer, trained on their first 67 million characters.",
    )
    command.add_argument("data", type=Path, metavar="DATA", help="folder to write, must not exist")
    command.add_argument(
        "--text", type=Path, nargs="+", metavar="PATH", help="files, and folders to search"
    )
    command.add_argument(
        "--source",
        type=_named_path,
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a file or folder of a source of its own, that a mixture can name; may be repeated "
        f"(that of --text is {_DEFAULT_SOURCE!r})",
    )
    command.add_argument("--pattern", default="*.py", help="of files in folders")
    command.add_argument("--field", default="text", help="of lines and rows, the one that is text")
    command.add_argument(
        "--max-bytes", type=integer(1), metavar="N", help="text to use at most, of each source"
    )
    command.add_argument(
        "--held-out", type=_share, default=0.02, metavar="X", help="share kept for evaluation"
    )
    command.add_argument(
        "--vocab-size", type=integer(257), default=2048, metavar="N", help="of the new tokenizer"
    )
    command.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="use a model's tokenizer and train none"
    )


def _named_path(text: str) -> tuple[str, Path]:
    """The type of an argument that names a source and says where it is."""
    from train.data import SOURCE_NAME

    name, _, path = text.partition("=")
    if not SOURCE_NAME.fullmatch(name) or not path:
        raise argparse.ArgumentTypeError(
            f"is {text!r:.80}, expected NAME=PATH with a name of letters, digits, '_', '-' and '.'"
        )
    return name, Path(path)


def _share(text: str) -> float:
    """The type of an argument that is a part of the whole and not all of it."""
    value = non_negative(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"is {text!r:.80}, expected a number between 0 and 1")
    return value


def _prepare(args: argparse.Namespace) -> int:
    from glm5_jax.atomic import refuse_existing
    from train.corpus import read_documents
    from train.data import SPLITS
    from train.encode import prepare

    refuse_existing(args.data)
    files = _find(args)
    documents = {
        name: read_documents(found, args.held_out, args.max_bytes, args.field)
        for name, found in files.items()
    }
    size = sum(file.path.stat().st_size for found in files.values() for file in found)
    if args.max_bytes is not None:
        size = min(size, args.max_bytes * len(files))
    data = prepare(documents, args.data, args.vocab_size, args.tokenizer, size=size)
    for name in data.sources:
        print(
            f"{args.data}: {name}: {sum(data.num_documents(split, name) for split in SPLITS):,} "
            f"documents, {data.num_tokens('train', name):,} tokens to train on, "
            f"{data.num_tokens('held_out', name):,} held out, {data.vocab_size:,} different ones"
        )
    return 0


def _find(args: argparse.Namespace) -> "dict[str, list[File]]":
    """The files of every source; none is in two, where it could be trained on and held out."""
    from train.corpus import STANDARD_LIBRARY_SKIP, find_files, standard_library

    roots: dict[str, list[Path]] = {}
    for name, path in [*((_DEFAULT_SOURCE, path) for path in args.text or ()), *args.source]:
        roots.setdefault(name, []).append(path)
    if not roots:
        library = find_files([standard_library()], args.pattern, STANDARD_LIBRARY_SKIP)
        return {_LIBRARY_SOURCE: library}
    files = {name: find_files(paths, args.pattern) for name, paths in roots.items()}
    used: dict[Path, str] = {}
    for name, found in files.items():
        for path, _ in found:
            if used.setdefault(path, name) != name:
                raise InputError(f"{path}: is in sources {used[path]} and {name}, expected in one")
    return files
