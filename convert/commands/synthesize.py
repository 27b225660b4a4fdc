"""`synthesize`, which makes a checkpoint up."""

import argparse
from pathlib import Path
from typing import Any

from convert.arguments import on_disk, setting, size
from glm5_jax.console import add_command
from glm5_jax.errors import InputError


def add(commands: Any) -> None:
    """Adds the command."""
    command = add_command(
        commands,
        "synthesize",
        _synthesize,
        "Write a checkpoint of made-up weights in the published layout.\n\n"
        "Its names, shapes, dtypes and files are those of a published one: converting it shows\n"
        "what time, memory and disk a conversion takes.",
    )
    command.add_argument("destination", type=on_disk, metavar="DST", help="must not exist")
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
        "--shard-size", type=size, default="5GiB", metavar="SIZE", help="most weights of a file"
    )


def _synthesize(args: argparse.Namespace) -> int:
    from convert.synthetic import synthesize
    from glm5_jax.config_json import parse_config, read_config
    from glm5_jax.presets import load_preset

    path = Path(args.config)
    start = read_config(path) if path.suffix == ".json" else load_preset(args.config)
    changes = dict(args.set)
    raw = start.raw | changes
    for key in parse_config(raw).unknown_keys:
        if key in changes:  # those of a file are left alone
            raise InputError(f"--set {key!r:.80}: the model has no such key")
    num_bytes = synthesize(
        args.destination,
        raw,
        args.shard_size,
        float8=args.float8,
        holes=args.holes,
    )
    print(f"{args.destination}: {num_bytes:,} bytes of weights")
    return 0
