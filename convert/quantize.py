"""Native checkpoints to native ones with weights in few bits, layer by layer."""

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert.conversion import (
    DEFAULT_EFFORT,
    Effort,
    Outline,
    check_destination,
    copy_along,
    report,
)
from convert.journal import Record
from convert.native_layout import FLOAT8, are_put, num_bytes
from convert.pipeline import Pipeline
from convert.record import manifest_entry, write_record
from convert.rounding import rounded_rows
from convert.shards import do_share
from convert.synthetic import FLOAT8_CONFIG
from convert.workspace import Workspace, open_workspace
from glm5_jax.atomic import sync
from glm5_jax.checkpoint import CONFIG_NAME, PARAMS_NAME, write_text_files
from glm5_jax.chunks import Layout
from glm5_jax.console import Advance
from glm5_jax.errors import InputError
from glm5_jax.model import Glm5
from glm5_jax.params import leaves_by_path
from glm5_jax.published.families import by_family
from glm5_jax.published.names import PublishedTensor, published_tensors
from glm5_jax.published.native import NativeSource
from glm5_jax.published.slices import slices
from glm5_jax.quantization import SCALES, SCHEMES, VALUES
from glm5_jax.quantized import packed
from glm5_jax.tree_writer import TreeWriter

_KEYS = ("chunks", "errors")  # of the record of a unit
_UNITS = "parts"


class Quantized(NamedTuple):
    """What was made."""

    num_tensors: int
    num_bytes: int
    # Of each tensor that is in few bits now: root of the mean square, of that of the weights.
    errors: Mapping[str, float]


def quantize(
    directory: Path, destination: Path, scheme: str, effort: Effort = DEFAULT_EFFORT
) -> Quantized | None:
    """Rounds the weights of a native checkpoint to few bits, or goes on with that.

    Args:
      scheme: a name in `quantization.SCHEMES`.

    Returns:
      None if other processes have not finished their share yet.

    Raises:
      InputError: the source is not a whole, sound checkpoint of plain weights, some of those are
        NaN or infinite, or the destination exists.
    """
    check_destination(destination, directory)
    with _opened(directory) as source:
        plan = {
            "source": str(directory.resolve()),
            "weights": source.digest,
            "config": source.raw_config,
            "scheme": scheme,
        }
        is_there = functools.partial(are_put, _leaves(source, scheme))
        with open_workspace(
            destination,
            plan,
            effort.share,
            keys=_KEYS,
            is_there=is_there,
            restart=effort.restart,
        ) as workspace:
            return _Quantization(source, scheme, workspace, effort).run()


def outline(directory: Path, scheme: str) -> Outline:
    """What `quantize` would do."""
    with _opened(directory) as source:
        made = _leaves(source, scheme)
        return Outline(
            num_units=len(_units(source)),
            num_tensors=len(source.tensors()),
            num_chunks=sum(math.prod(place.grid) for place in made.values()),
            bytes_read=sum(map(num_bytes, source.leaves.values())),
            bytes_written=sum(map(num_bytes, made.values())),
            units=_UNITS,
        )


@contextlib.contextmanager
def _opened(directory: Path) -> Iterator[NativeSource]:
    with contextlib.closing(NativeSource(directory)) as source:
        report(source)
        if any(leaf.endswith(VALUES) for leaf in source.leaves):
            raise InputError(
                f"{directory}: has weights in few bits already, expected plain ones: errors would "
                "add up"
            )
        yield source


def _leaves(source: NativeSource, scheme: str) -> dict[str, Layout]:
    """How the weights will lie."""
    leaves = dict(source.leaves)
    for leaf, weight in leaves_by_path(Glm5(source.config)).items():
        if SCHEMES[scheme].keeps(leaf, weight):
            del leaves[leaf]
            leaves |= SCHEMES[scheme].layouts(leaf, weight)
    return leaves


def _units(source: NativeSource) -> dict[str, list[PublishedTensor]]:
    """What is done and noted together: what a leaf holds of a layer."""
    units: dict[str, list[PublishedTensor]] = {}
    for tensor in published_tensors(source.config):
        units.setdefault(".".join(map(str, (tensor.leaf, *tensor.at[:1]))), []).append(tensor)
    return units


class _Error(NamedTuple):
    """Sums of squares."""

    missed: float
    weights: float


class _Quantization:
    """One run of the command."""

    def __init__(self, source: NativeSource, scheme: str, workspace: Workspace, effort: Effort):
        self._source, self._name, self._scheme = source, scheme, SCHEMES[scheme]
        self._workspace, self._effort = workspace, effort
        self._leaves = _leaves(source, scheme)
        self._units = _units(source)
        self._weights = leaves_by_path(Glm5(source.config))
        params = workspace.content / PARAMS_NAME
        # Weights are all there if a process was killed between making them a tree and the rename.
        self._writer = None if params.exists() else TreeWriter(params, self._leaves)

    def run(self) -> Quantized | None:
        sizes = {unit: sum(map(self._size, tensors)) for unit, tensors in self._units.items()}
        written = sum(map(num_bytes, self._leaves.values()))
        growth = written / sum(sizes.values())
        do_share(
            "quantize",
            self._workspace,
            sizes,
            self._effort,
            self._round,
            units=_UNITS,
            growth=growth,
        )
        with self._workspace.finishing(sizes) as records:
            if records is None:
                return None
            errors = {k: v for record in records.values() for k, v in record["errors"].items()}
            self._commit(records, errors)
        return Quantized(sum(map(len, self._units.values())), written, errors)

    def _size(self, tensor: PublishedTensor) -> int:
        return math.prod(tensor.shape) * self._source.dtype(tensor.name).itemsize

    def _round(self, unit: str, pipeline: Pipeline, advance: Advance) -> Record:
        """Rounds tensors, or copies them if they are left alone, several at a time."""
        doing: list[tuple[str, Future[tuple[list[Any], _Error | None]]]] = []
        for tensor in self._units[unit]:
            kept = tensor.leaf + VALUES if self._is_kept(tensor) else tensor.leaf
            largest = max(
                slices(tensor, self._leaves[kept]), key=lambda part: part.stop - part.start
            )
            # As read, in float32, scaled, and multiplied out again.
            memory = 16 * (largest.stop - largest.start) * math.prod(tensor.shape[1:])
            pipeline.take(memory)

            def do(
                tensor: PublishedTensor = tensor, memory: int = memory
            ) -> tuple[list[Any], _Error | None]:
                done = self._round_one(tensor) if self._is_kept(tensor) else self._copy(tensor)
                pipeline.give_back(memory)
                advance(self._size(tensor))
                return done

            doing.append((tensor.name, pipeline.submit(do)))
        chunks: list[Any] = []
        errors = {}
        for name, future in doing:
            entries, error = future.result()
            chunks += entries
            if error is not None:
                errors[name] = math.sqrt(error.missed / error.weights) if error.weights else 0.0
        if self._writer is not None:
            self._writer.flush()
        size = sum(map(self._size, self._units[unit]))
        return {"shard": unit, "size": size, "sha256": None, "chunks": chunks, "errors": errors}

    def _is_kept(self, tensor: PublishedTensor) -> bool:
        return self._scheme.keeps(tensor.leaf, self._weights[tensor.leaf])

    def _put(self, leaf: str, position: tuple[int, ...], chunk: np.ndarray) -> list[Any]:
        assert self._writer is not None
        return [leaf, position, self._writer.put(leaf, position, chunk)]

    def _copy(self, tensor: PublishedTensor) -> tuple[list[Any], None]:
        entries = []
        for part in slices(tensor, self._leaves[tensor.leaf]):
            rows = self._source.read(tensor.name, part.start, part.stop)
            entries.append(self._put(tensor.leaf, part.position, rows.reshape(part.chunk_shape)))
        return entries, None

    def _round_one(self, tensor: PublishedTensor) -> tuple[list[Any], _Error]:
        """Rounds a tensor, a chunk at a time, each with the rest of the blocks it begins in."""
        leaf, scheme = tensor.leaf + VALUES, self._scheme
        entries, scales, missed, weights = [], [], 0.0, 0.0
        for part in slices(tensor, self._leaves[leaf]):
            rows = rounded_rows(
                self._source, tensor.name, tensor.shape, part.start, part.stop, scheme
            )
            missed += float(np.square(rows.plain - rows.back, dtype=np.float64).sum())
            weights += float(np.square(rows.plain, dtype=np.float64).sum())
            values = packed(rows.values) if scheme.kind == "int4" else rows.values
            entries.append(self._put(leaf, part.position, values.reshape(part.chunk_shape)))
            scales.append(rows.scales)
        whole = scheme.of_leaf(np.concatenate(scales), self._weights[tensor.leaf])
        place = self._leaves[tensor.leaf + SCALES]
        (position,) = place.within(tensor.at)
        entries.append(self._put(tensor.leaf + SCALES, position, whole.reshape(place.chunk)))
        return entries, _Error(missed, weights)

    def _commit(self, records: dict[str, Record], errors: Mapping[str, float]) -> None:
        if self._writer is None:
            return
        for record in records.values():
            for leaf, position, digest in record["chunks"]:
                self._writer.has_put(leaf, tuple(position), digest)
        content, origin = self._workspace.content, self._source.directory
        config = dict(self._source.raw_config)
        if self._scheme == FLOAT8:
            config["quantization_config"] = FLOAT8_CONFIG
        options = {"scheme": self._name}
        options |= {f"error of {tensors}": error for tensors, error in error_lines(errors)}
        read = manifest_entry(self._source)
        write_record(content, "quantize", origin, options, read=read, written={})
        copy_along(origin, content)
        write_text_files(content, config, origin)
        for path in content.iterdir():
            if path.is_file():
                sync(path)
        self._writer.commit(beside=[CONFIG_NAME])


def error_lines(errors: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """The errors for a reader: of tensors whose names differ only in numbers, in one line."""
    for subject, _, names in by_family((name, "") for name in errors):
        found = [errors[name] for name in names]
        yield subject, f"{np.mean(found):.3%}, at most {max(found):.3%}"
