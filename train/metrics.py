"""The metrics of a run: an object of JSON for every step, on a line of its own."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from glm5_jax.atomic import new_file
from glm5_jax.errors import InputError
from glm5_jax.strict_json import parse_json
from train.step import Metrics

METRICS_NAME = "metrics.jsonl"

# What is read again, of every step and of those with an evaluation.
_NUMBERS = ("step", "loss", "index_loss", "tokens_per_second")
_HELD_OUT_NUMBERS = ("held_out_loss", "bits_per_byte")


def make_record(step: int, metrics: Metrics, rate: float) -> dict[str, Any]:
    """The numbers of a step."""
    losses = metrics.losses
    known = {"sequence_imbalance": float(losses.imbalance)} if losses.imbalance > 0 else {}
    return known | {
        "step": step,
        "loss": float(losses.next_token),
        "mtp_losses": [float(value) for value in losses.mtp_D],
        "index_loss": float(losses.indexers),
        "index_losses": [float(value) for value in losses.indexer_L],
        "z": float(losses.z),
        "learning_rate": rate,
        "gradient_norm": float(metrics.gradient_norm),
        "weight_norm": float(metrics.weight_norm),
        "imbalance": float(metrics.imbalance),
    }


def require_finite(record: dict[str, Any], run: Path) -> None:
    """Raises `InputError` if a number of a step is not finite."""
    for name, value in record.items():
        if not np.all(np.isfinite(value)):
            raise InputError(
                f"{run}: the {name} of step {record['step']} is {value}, expected a finite number; "
                "a lower learning rate may help"
            )


def to_line(record: dict[str, Any]) -> str:
    """A record as a line of the file."""
    return json.dumps(record, allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a file; a last line that was cut off is left out.

    Raises:
      InputError: there is no such file, or a line is not the record of a step.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}: line {number}"
        record = parse_json(line, where)
        _check(record, where)
        records.append(record)
        depths = [len(records[place]["mtp_losses"]) for place in (0, -1)]
        if depths[0] != depths[1]:
            raise InputError(f"{where}: has {depths[1]} mtp_losses, expected {depths[0]}")
    return records


def forget_later_steps(path: Path, last: int) -> None:
    """Drops the metrics of steps that will be taken again."""
    kept = [record for record in read_metrics(path) if record["step"] <= last]
    with new_file(path, overwrite=True) as partial:
        partial.write_text("".join(map(to_line, kept)))


def summary(record: dict[str, Any]) -> str:
    """A line about a step with an evaluation."""
    ahead = "".join(f", mtp {value:.3f}" for value in record["mtp_losses"])
    if record["index_losses"]:
        ahead += f", indexers {record['index_loss']:.3f}"
    return (
        f"step {record['step']}: loss {record['loss']:.3f}{ahead}, held out "
        f"{record['held_out_loss']:.3f}, {record['bits_per_byte']:.3f} bits per byte, "
        f"{record['tokens_per_second']:,.0f} tokens/s"
    )


def _check(record: dict[str, Any], where: str) -> None:
    is_evaluated = not record.keys().isdisjoint(_HELD_OUT_NUMBERS)
    for name in _NUMBERS + (_HELD_OUT_NUMBERS if is_evaluated else ()):
        if not _is_number(record.get(name)):
            raise InputError(f"{where}: {name} is {record.get(name)!r:.80}, expected a number")
    ahead = record.get("mtp_losses")
    if not isinstance(ahead, list) or not all(map(_is_number, ahead)):
        raise InputError(f"{where}: mtp_losses is {ahead!r:.80}, expected a list of numbers")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
