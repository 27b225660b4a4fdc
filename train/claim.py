"""What a run is, written down when it starts and compared whenever it goes on."""

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from glm5_jax.atomic import locked, new_directory, new_file
from glm5_jax.config import Config
from glm5_jax.config_json import config_to_json
from glm5_jax.console import notice
from glm5_jax.errors import InputError
from glm5_jax.strict_json import read_json
from train.settings import Settings

RUN_NAME = "run.json"
WriteDown = Callable[[], None]

# The settings that are the same from the first step of a run to the last.
_LASTING = tuple(
    field.name for field in dataclasses.fields(Settings) if not field.metadata["may_change"]
)


def describe(
    config: Config, stages: Sequence[Settings], data_digest: str, initial: Path | None
) -> dict[str, Any]:
    """A run in JSON."""
    return {
        "stages": [dataclasses.asdict(settings) for settings in stages],
        "config": config_to_json(config),
        "data": {"digest": data_digest},
        "start": {"from": None if initial is None else str(initial.resolve())},
    }


def digest(description: dict[str, Any]) -> str:
    """Of all in a description that steps depend on."""
    stages = [{name: stage[name] for name in _LASTING} for stage in description["stages"]]
    lasting = json.dumps(description | {"stages": stages}, sort_keys=True)
    return hashlib.sha256(lasting.encode()).hexdigest()[:24]


@contextlib.contextmanager
def claimed(run: Path, description: dict[str, Any], accept_changes: bool) -> Iterator[WriteDown]:
    """Makes a run's folder, or compares what it was with what it is to be.

    What a process that was killed left half-written there is removed. While in the body, no other
    process of this machine can claim it.

    Args:
      accept_changes: let it be another run than the one that was written down, though there are
        checkpoints of that.

    Yields:
      What writes down what the run is now, to be called once it is sure to go on.

    Raises:
      InputError: the folder is no run's, the run was another, or is claimed already.
    """
    if not run.exists():
        with new_directory(run) as directory:
            _write(directory / RUN_NAME, description)
    if not (run / RUN_NAME).exists():
        raise InputError(f"{run}: exists already and is not a run, expected a new name")
    with locked(run, f"{run}: another process is training this run"):
        found = read_json(run / RUN_NAME)
        changes = _changes(found, description, run / RUN_NAME)
        has_begun = any(run.glob("step-*"))  # else there is nothing to go on with
        if changes and has_begun and not accept_changes:
            raise InputError(
                f"{run / RUN_NAME}: the run was started with {'; '.join(changes)}; expected the "
                "same, or --accept-changes"
            )
        if changes and has_begun:
            notice(f"{run}: goes on otherwise than it was started, with {'; '.join(changes)}")

        def write() -> None:
            if found != description:
                with new_file(run / RUN_NAME, overwrite=True) as partial:
                    _write(partial, description)

        for unfinished in run.glob(".*.partial-*"):
            shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()
        yield write


def _write(path: Path, description: dict[str, Any]) -> None:
    path.write_text(json.dumps(description, indent=2, allow_nan=False) + "\n")


def _changes(found: dict[str, Any], wanted: dict[str, Any], path: Path) -> list[str]:
    """What differs, but for settings that no step depends on."""
    changes = []
    for part in ("config", "data", "start"):
        changes += _differences(_object(found.get(part), f"{path}: {part}"), wanted[part], path)
    stages = found.get("stages")
    if not isinstance(stages, list):
        raise InputError(f"{path}: stages is {stages!r:.80}, expected a list")
    if len(stages) != len(wanted["stages"]):
        return [*changes, f"{len(stages)} stages, not {len(wanted['stages'])}"]
    for number, (before, now) in enumerate(zip(stages, wanted["stages"], strict=True), start=1):
        of_stage = f"stage {number} " if len(stages) > 1 else ""
        settings = _object(before, f"{path}: a stage")
        differences = _differences(settings, {name: now[name] for name in _LASTING}, path)
        changes += [of_stage + difference for difference in differences]
    return changes


def _differences(found: dict[str, Any], wanted: dict[str, Any], path: Path) -> list[str]:
    if missing := sorted(wanted.keys() - found.keys()):
        raise InputError(
            f"{path}: has no {', '.join(missing)}: the run was started by another version, "
            "expected a new RUN"
        )
    return [
        f"{key} {found[key]!r:.80}, not {value!r:.80}"
        for key, value in wanted.items()
        if found[key] != value
    ]


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{what} is {value!r:.80}, expected an object")
    return value
