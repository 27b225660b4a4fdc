"""Checkpoints of made-up weights, with the names, shapes, dtypes and files of published ones.

They show what a conversion takes on a machine, in time, memory and disk, before terabytes are
fetched; tests and benchmarks convert them.
"""

import functools
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.progress import DownloadColumn, TransferSpeedColumn

from convert.conversion import require_room
from convert.writer import Entry, file_header, shard_names, split_shards, write_index
from glm5_jax.atomic import new_directory
from glm5_jax.checkpoint import CONFIG_NAME
from glm5_jax.config import Config
from glm5_jax.config_json import parse_config
from glm5_jax.console import progress
from glm5_jax.published.fp8 import BLOCK, SCALE_SUFFIX, scale_shape
from glm5_jax.published.names import published_tensors
from glm5_jax.quantization import LEFT_ALONE

_NOISE_BYTES = 2**25
FLOAT8_CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}


def published_entries(config: Config, *, float8: bool = False) -> list[Entry]:
    """The tensors of a published checkpoint in bfloat16, or in float8 with scales."""
    entries = []
    for name, shape, leaf, _ in published_tensors(config):
        if leaf.endswith("router.bias"):
            entries.append(Entry(name, shape, jnp.dtype(jnp.float32)))
        elif not float8 or len(shape) != 2 or leaf.endswith(LEFT_ALONE):
            entries.append(Entry(name, shape, jnp.dtype(jnp.bfloat16)))
        else:
            entries.append(Entry(name, shape, jnp.dtype(jnp.float8_e4m3fn)))
            entries.append(Entry(name + SCALE_SUFFIX, scale_shape(shape), jnp.dtype(jnp.float32)))
    return entries


def synthesize(
    destination: Path,
    raw: Mapping[str, Any],
    shard_bytes: int,
    *,
    float8: bool = False,
    holes: bool = False,
) -> int:
    """Writes a checkpoint of made-up weights.

    Args:
      raw: the object of its `config.json`.
      holes: write headers only; what follows them reads as zeros and takes no space on the disk.

    Returns:
      How many bytes of weights there are.

    Raises:
      InputError: the config is not one of this model, the destination exists, or the disk is too
        small.
    """
    entries = published_entries(parse_config(dict(raw)).config, float8=float8)
    parts = split_shards(entries, shard_bytes)
    shards = dict(zip(shard_names(len(parts)), parts, strict=True))
    total = sum(entry.num_bytes for entry in entries)
    if not holes:
        require_room(destination, total)
    columns = (DownloadColumn(), TransferSpeedColumn())
    with (
        new_directory(destination) as directory,
        progress("synthesize", total, *columns) as advance,
    ):
        for name, shard in shards.items():
            with (directory / name).open("wb") as file:
                file.write(file_header(shard))
                if holes:
                    os.truncate(file.fileno(), file.tell() + sum(e.num_bytes for e in shard))
                    continue
                for entry in shard:
                    for part in _noise(entry):
                        file.write(part)
                        advance(len(part))
        if len(shards) > 1:
            write_index(directory, shards)
        config = dict(raw) | ({"quantization_config": FLOAT8_CONFIG} if float8 else {})
        (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
    return total


def _noise(entry: Entry) -> Iterator[memoryview]:
    """The data of a tensor, in portions: the noise of its dtype, from a place of its own on."""
    noise = _make_noise(entry.dtype)
    start = zlib.crc32(entry.name.encode()) % len(noise)
    start -= start % entry.dtype.itemsize
    left = entry.num_bytes
    while left:
        part = noise[start : start + left]
        yield part
        left -= len(part)
        start = 0


@functools.cache
def _make_noise(dtype: np.dtype) -> memoryview:
    rng = np.random.default_rng(5)
    count = _NOISE_BYTES // dtype.itemsize
    if dtype == jnp.float8_e4m3fn:
        values = rng.integers(0, 0x7F, count, np.uint8) | (rng.integers(0, 2, count, np.uint8) << 7)
    elif dtype == np.float32:  # scales, and biases of routers
        values = rng.uniform(1e-4, 1e-3, count).astype(dtype)
    else:
        values = (0.02 * rng.standard_normal(count, np.float32)).astype(dtype)
    return values.view(np.uint8).data
