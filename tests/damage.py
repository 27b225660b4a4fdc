"""What tests of damaged checkpoints share: small ones, ways to edit them, what a refusal is."""

import contextlib
import functools
import json
import os
import random
import resource
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from convert.__main__ import main
from tests.tiny import TINY, float8_weights, random_weights, write_published

# As few leaves as have every kind of tensor: dense and sparse layers, MTP, float8 with scales.
SMALL = TINY | {
    "num_hidden_layers": 2,
    "mlp_layer_types": ["dense", "sparse"],
    "indexer_types": ["full", "full"],
    "n_routed_experts": 4,
}
DIRECTIONS = ["from-hf", "to-hf", "quantize"]
SHARDS = ["--shard-size", "100KB"]
_CEILING = 2**30  # bytes that a refused command may allocate


@functools.cache
def weights() -> dict[str, np.ndarray]:
    """The tensors of the small published checkpoint, scales included."""
    return float8_weights(random_weights(SMALL))[0]


def make_checkpoints(folder: Path) -> Path:
    """A published checkpoint, the native one made of it, and what is made of that."""
    source = write_published(folder / "source", SMALL, weights(), num_shards=3)
    (source / "tokenizer.json").write_text("{}")
    (source / "README.md").write_text("# A model")
    for direction, made in (("from-hf", "native"), ("to-hf", "back"), ("quantize", "few")):
        assert main(command(direction, folder, folder / made)) == 0
    return folder


def command(direction: str, made: Path, destination: Path, *options: str) -> list[str]:
    """Arguments that make one of the checkpoints again."""
    origin, own = {
        "from-hf": ("source", []),
        "to-hf": ("native", SHARDS),
        "quantize": ("native", ["--to", "int4"]),
    }[direction]
    return [direction, str(made / origin), str(destination), *own, *options]


def whole(direction: str, made: Path) -> dict[str, bytes]:
    """What such a command makes."""
    return contents(made / {"from-hf": "native", "to-hf": "back", "quantize": "few"}[direction])


def contents(directory: Path) -> dict[str, bytes]:
    """Every file's bytes but Orbax's, which have a time in them."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name not in ("_CHECKPOINT_METADATA", "commit_success.txt")
    }


def everything(folder: Path) -> dict[str, Any]:
    """Whatever is beneath a folder; of small files, what they hold."""
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        info = path.lstat()
        held: Any = info.st_size
        if path.is_symlink():
            held = os.readlink(path)
        elif stat.S_ISREG(info.st_mode) and info.st_size < 2**24:
            held = path.read_bytes()
        elif not stat.S_ISREG(info.st_mode):
            held = None
        found[str(path.relative_to(folder))] = (stat.S_IFMT(info.st_mode), held)
    return found


@contextlib.contextmanager
def limited(kind: int, limit: int) -> Iterator[None]:
    """Lets this process have so much of a resource."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Refuses memory beyond a ceiling, which is far above what small checkpoints take."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    with limited(resource.RLIMIT_AS, used + _CEILING):
        yield


def one_line(capsys: Any, arguments: list[Any], *said: str) -> str:
    """Runs a command that must say what is wrong on one line, and returns that."""
    capsys.readouterr()
    with little_memory():
        status = main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    assert (status, output.out) == (2, ""), output
    assert output.err.startswith("glm5-convert: error: ") and output.err.count("\n") == 1
    assert output.err.rstrip("\n").isprintable() and len(output.err) < 9000
    for phrase in said:
        assert phrase in output.err, output.err
    return output.err


def refused(capsys: Any, place: Path, arguments: list[Any], *said: str) -> None:
    """Runs a command that must end so, and leave everything as it was.

    Args:
      place: a folder with the source, the destination and what else might be written to.
    """
    before = everything(place)
    one_line(capsys, arguments, *said)
    assert everything(place) == before


def edit_json(path: Path, edit: Callable[[Any], Any]) -> None:
    """Changes what a file of JSON says, in place."""
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def edit_header(path: Path, edit: Callable[[Any], Any]) -> None:
    """Changes the header of a safetensors file; `edit` may return the bytes of another one."""
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])
    changed = edit(header)
    text = changed if isinstance(changed, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[end:])


def flip_bit(path: Path, rng: random.Random, start: int = 0, stop: int | None = None) -> int:
    """Flips one bit of a file between two bytes; returns which byte it was in."""
    whole = bytearray(path.read_bytes())
    at = rng.randrange(start, len(whole) if stop is None else stop)
    whole[at] ^= 1 << rng.randrange(8)
    path.write_bytes(whole)
    return at


def cut(path: Path, rng: random.Random) -> int:
    """Cuts a file off at some byte; returns which."""
    at = rng.randrange(path.stat().st_size)
    os.truncate(path, at)
    return at


def data_start(path: Path) -> int:
    """Where the header of a safetensors file ends."""
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def replace(path: Path, by: str) -> None:
    """Puts something else under a name."""
    path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
    if by == "a file":
        path.touch()
    elif by == "a folder":
        path.mkdir()
    elif by == "a pipe":
        os.mkfifo(path)
    elif by == "a terabyte of holes":
        path.touch()
        os.truncate(path, 2**40)
    elif by == "a loop of links":
        path.symlink_to(path.name)
    elif by == "a link to a device":
        path.symlink_to("/dev/zero")
    else:
        raise ValueError(by)


def random_shard(source: Path, rng: random.Random) -> Path:
    """One of the files of weights."""
    return rng.choice(sorted(source.glob("*.safetensors")))
