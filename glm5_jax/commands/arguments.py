"""Arguments that several commands take."""

import argparse
import functools
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from glm5_jax.console import notice
from glm5_jax.coordination import require_same
from glm5_jax.errors import InputError
from glm5_jax.models import SHIPPED, shipped
from glm5_jax.published.families import printable
from glm5_jax.remote import AnyPath

if TYPE_CHECKING:
    from glm5_jax.config import Config
    from glm5_jax.mesh import Job
    from glm5_jax.model import Glm5
    from glm5_jax.sharding import Partition


def integer(low: int, high: int = 2**53) -> Callable[[str], int]:
    """The type of an argument that is an integer from `low` to `high`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            expected = f"from {low} to {high}" if high < 2**53 else f"of at least {low}"
            raise argparse.ArgumentTypeError(f"is {text!r:.80}, expected an integer {expected}")
        return value

    return parse


def non_negative(text: str) -> float:
    """The type of an argument that is a finite number and not below zero."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"is {text!r:.80}, expected a finite number of at least 0")
    return value


def positive(text: str) -> float:
    """The type of an argument that is a finite number above zero."""
    if value := non_negative(text):
        return value
    raise argparse.ArgumentTypeError(f"is {text!r:.80}, expected a number above 0")


def add_model(command: argparse.ArgumentParser) -> None:
    """Adds the arguments that `load` reads."""
    command.add_argument(
        "--model",
        type=_model_directory,
        required=True,
        metavar="DIR",
        help="a native checkpoint or a published directory, or a model that comes along: "
        + ", ".join(SHIPPED),
    )
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of weights and activations (default: that of the checkpoint; float32 for float16)",
    )
    add_mesh(command)


def _model_directory(name: str) -> Path:
    """The folder of that name, or of the model of that name."""
    return shipped(name) if name in SHIPPED and not Path(name).exists() else Path(name)


def read_config_of(name: str) -> "Config":
    """The config of a checkpoint's directory or of a preset.

    Raises:
      InputError: there is neither.
    """
    from glm5_jax.load import read_model_config
    from glm5_jax.presets import PRESETS, load_preset

    directory = Path(name)
    if directory.is_dir():
        published = read_model_config(directory)
        report_unknown_keys(directory, published.unknown_keys)
        return published.config
    if name not in PRESETS:
        raise InputError(
            f"{name}: is neither a directory nor one of the presets {', '.join(PRESETS)}"
        )
    return load_preset(name).config


def add_mesh(command: argparse.ArgumentParser) -> None:
    """Adds the argument that `partition_for` reads."""
    command.add_argument(
        "--mesh",
        default="auto",
        metavar="data=D,expert=E,model=M",
        help="how devices divide the work: their product is the number of devices",
    )


@functools.cache  # what is compiled for a partition is not found for another that is equal
def partition_for(config: "Config", mesh: str, job: "Job", batch: int = 0) -> "Partition":
    """The mesh that an argument names, or a sensible one, with the rules for a job on it.

    Args:
      batch: rows that must be divided evenly.

    Raises:
      InputError: the mesh is not for the devices at hand, or does not divide the model evenly.
    """
    import jax

    from glm5_jax.mesh import make_mesh
    from glm5_jax.model import Glm5
    from glm5_jax.sharding import DECODE, TRAIN, Partition, mesh_sizes

    rules = DECODE if job == "run" else TRAIN
    sizes = mesh_sizes(mesh, jax.device_count(), Glm5(config), rules, batch)
    return Partition(make_mesh(sizes), rules)


def load(args: argparse.Namespace) -> "tuple[Glm5, Partition]":
    """Loads the model that the arguments name, and says how it lies on the devices.

    Raises:
      InputError: it cannot be loaded.
    """
    from glm5_jax.load import dtype_to_run, load_model, read_model_config
    from glm5_jax.mesh import announcement

    published = read_model_config(args.model)
    report_unknown_keys(args.model, published.unknown_keys)
    dtype = dtype_to_run(published.config.dtype, args.dtype)
    partition = partition_for(published.config, args.mesh, "run")
    if partition.mesh.size > 1:
        notice(announcement(partition.mesh))
    return load_model(args.model, dtype, partition), partition


def require_same_input(args: argparse.Namespace, **values: object) -> None:
    """Checks that all processes read the same; arguments are those of `add_processes`.

    Raises:
      InputError: a value differs.
    """
    digests = {
        f"digest of the {name}": hashlib.sha256(repr(value).encode()).hexdigest()[:12]
        for name, value in values.items()
    }
    require_same("input", digests, int(args.start_timeout))


def checkpoint_identity(directory: Path) -> str:
    """A digest of what a model's directory has: names and sizes of its files, and small ones whole.

    Native checkpoints have a manifest with digests of all weights among these.
    """
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*.json")):
        digest.update(path.read_bytes())
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    digest.update(repr([(str(p.relative_to(directory)), p.stat().st_size) for p in files]).encode())
    return digest.hexdigest()


def report_unknown_keys(directory: AnyPath, keys: tuple[str, ...]) -> None:
    """Lists keys of `config.json` that bear on nothing."""
    if keys:
        named = ", ".join(map(printable, keys))
        notice(f"{directory}: keys of config.json that are not used: {named}")
