"""The metrics of a run: an object of JSON for every step, on a line of its own."""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glm5_jax.atomic import new_file
from glm5_jax.console import notice
from glm5_jax.errors import InputError
from glm5_jax.strict_json import parse_json
from train.stages import Stage
from train.step import Metrics

METRICS_NAME = "metrics.jsonl"

# What is read again: of every step, of those with an evaluation, and what need not be there.
_NUMBERS = ("loss", "index_loss", "tokens_per_second")
_HELD_OUT_NUMBERS = ("held_out_loss", "bits_per_byte")
_MORE_NUMBERS = ("learning_rate", "gradient_norm", "imbalance", "tokens", "mfu")
_LISTS = ("index_losses", "held_out_mtp_losses", "index_recall", "mtp_acceptance")
# What a step comes to that is skipped for it.
_MAY_BE_NULL = {"loss", "mtp_losses", "index_loss", "index_losses", "gradient_norm"}


def make_record(step: int, stage: Stage, metrics: Metrics) -> dict[str, Any]:
    """The numbers of a step of a stage."""
    losses = metrics.losses
    record: dict[str, Any] = {
        "step": step,
        "stage": stage.settings.stage,
        "stage_number": stage.number,
        "loss": float(losses.next_token),
        "mtp_losses": [float(value) for value in losses.mtp_D],
        "index_loss": float(losses.indexers),
        "index_losses": [float(value) for value in losses.indexer_L],
        "z": float(losses.z),
        "learning_rate": float(metrics.rate),
        "gradient_norm": float(metrics.gradient_norm),
        "weight_norm": float(metrics.weight_norm),
        "imbalance": float(metrics.imbalance),
    }
    if losses.imbalance > 0:
        record["sequence_imbalance"] = float(losses.imbalance)
    if not metrics.is_taken:
        record["skipped"] = True
    return record


def require_finite(record: dict[str, Any], run: Path) -> None:
    """Raises `InputError` if a number of a step that was taken is not finite."""
    for name, value in record.items():
        if not record.get("skipped") and not _is_finite(value):
            raise InputError(
                f"{run}: the {name} of step {record['step']} is {value!r:.80}, expected a finite "
                "number; a lower learning rate may help"
            )


def to_line(record: dict[str, Any]) -> str:
    """A record as a line of the file; what is not finite in a skipped step is null there."""
    if record.get("skipped"):
        record = {name: _finite_or_none(value) for name, value in record.items()}
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
    return records


def forget_later_steps(path: Path, last: int) -> None:
    """Drops the metrics of steps that will be taken again.

    Weights are worth more than their history: a file that is damaged is put aside.
    """
    if not path.exists():
        return
    try:
        kept = [record for record in read_metrics(path) if record["step"] <= last]
    except InputError as error:
        aside = path.with_name(f"damaged-{path.name}")
        path.replace(aside)
        notice(f"{error}; it is {aside.name} now, and a new one begins")
        return
    with new_file(path, overwrite=True) as partial:
        partial.write_text("".join(map(to_line, kept)))


def shown(record: dict[str, Any]) -> str:
    """What a progress bar says of a step: how well it learns, and how fast."""
    if record.get("skipped"):
        learnt = "update skipped"
    elif record.get("stage") == "warmup":
        learnt = f"indexers {record['index_loss']:.3f}"
    else:
        learnt = f"loss {record['loss']:.3f}"
    speed = record["tokens_per_second"]
    parts = [learnt, f"{speed:,.0f} tokens/s"]
    each = record.get("tokens_per_second_per_device", speed)
    if each != speed:
        parts.append(f"{each:,.0f} per device")
    if "mfu" in record:
        parts.append(f"MFU {record['mfu']:.0%}")
    return ", ".join(parts)


def summary(record: dict[str, Any]) -> str:
    """A line about a step with an evaluation."""
    ahead = "".join(f", mtp {value:.3f}" for value in record["mtp_losses"])
    if record["index_losses"]:
        ahead += f", indexers {record['index_loss']:.3f}"
    measured = ""
    if recalls := record["index_recall"]:
        measured += f", recall {sum(recalls) / len(recalls):.2f}"
    if shares := record["mtp_acceptance"]:
        measured += ", accepted " + "/".join(f"{share:.2f}" for share in shares)
    return (
        f"step {record['step']}: loss {record['loss']:.3f}{ahead}, held out "
        f"{record['held_out_loss']:.3f}, {record['bits_per_byte']:.3f} bits per byte{measured}, "
        f"{record['tokens_per_second']:,.0f} tokens/s"
    )


def _check(record: dict[str, Any], where: str) -> None:
    def require(name: str, holds: Callable[[Any], bool], expected: str) -> None:
        if not holds(value := record.get(name)):
            raise InputError(f"{where}: {name} is {value!r:.80}, expected {expected}")

    nullable = _MAY_BE_NULL if record.get("skipped") is True else set()
    is_evaluated = not record.keys().isdisjoint(_HELD_OUT_NUMBERS)
    more = [name for name in _MORE_NUMBERS if name in record]
    require("step", lambda step: type(step) is int, "a whole number")
    for name in (*_NUMBERS, *(_HELD_OUT_NUMBERS if is_evaluated else ()), *more):
        require(name, _is_number_or_null if name in nullable else _is_number, "a number")
    for name in ("mtp_losses", *(name for name in _LISTS if name in record)):
        is_one = _is_number_or_null if name in nullable else _is_number
        require(name, functools.partial(_is_list, is_one), "a list of numbers")
    if "expert_loads" in record:
        require("expert_loads", _is_table, "lists of numbers, all as long")
    if "stage" in record:
        require("stage", lambda stage: isinstance(stage, str) and stage.isalpha(), "a word")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_number_or_null(value: Any) -> bool:
    return value is None or _is_number(value)


def _is_list(is_one: Callable[[Any], bool], value: Any) -> bool:
    return isinstance(value, list) and all(map(is_one, value))


def _is_table(value: Any) -> bool:
    is_one = _is_list(functools.partial(_is_list, _is_number), value)
    return is_one and len(set(map(len, value))) <= 1


def _is_finite(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _finite_or_none(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite_or_none(part) for part in value]
    return value if _is_finite(value) else None
