"""Run files: what to train and how, in TOML.

Keys are the settings' and hold for all stages; in each `[[stages]]` they hold for that one.
"""

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from glm5_jax.errors import InputError
from train.settings import Settings

if TYPE_CHECKING:
    from glm5_jax.config_json import PublishedConfig

_FOLDER = Path(__file__).parent / "runs"
READY = tuple(sorted(path.stem for path in _FOLDER.glob("*.toml")))

_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
_FIELDS = {field.name: field for field in dataclasses.fields(Settings)}


class RunFile(NamedTuple):
    """What a run file says, checked but for what settings check themselves."""

    config: str | None  # a preset's name, or a path
    stages: tuple[dict[str, Any], ...]  # settings by name, of every stage


def read_run_file(name: str) -> RunFile:
    """Reads one of the ready run files by its name, or any other by its path.

    A config that is not a preset is a path from the file's folder.

    Raises:
      InputError: it cannot be read, or has keys or values that mean nothing.
    """
    path = _FOLDER / f"{name}.toml" if name in READY else Path(name)
    if not path.exists():
        raise InputError(f"{name}: is neither a file nor one of the run files {', '.join(READY)}")
    try:
        values = tomllib.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # of TOML, UTF-8, digits and nesting
        raise InputError(f"{path}: is not TOML: {error}") from None
    config = values.pop("config", None)
    if not isinstance(config, str | None):
        raise InputError(f"{path}: config is {config!r:.80}, expected a preset's name or a file")
    if config is not None and (beside := path.parent / config).is_file():
        config = str(beside)
    stages = values.pop("stages", [{}])
    if not isinstance(stages, list) or not stages or not all(isinstance(s, dict) for s in stages):
        raise InputError(f"{path}: stages is {stages!r:.80}, expected tables [[stages]]")
    common = _checked(values, f"{path}: ", "config", "stages")
    return RunFile(
        config,
        tuple(
            common | _checked(stage, f"{path}: stage {number}: ")
            for number, stage in enumerate(stages, start=1)
        ),
    )


def config_of(name: str | None) -> "PublishedConfig":
    """The config that a run file or an option names.

    Raises:
      InputError: there is none.
    """
    from glm5_jax.config_json import read_config
    from glm5_jax.presets import PRESETS, load_preset

    if name is None:
        raise InputError("there is no config, expected --config, or one in the run file")
    if name in PRESETS:
        return load_preset(name)
    if not Path(name).is_file():
        raise InputError(f"{name}: is neither a file nor one of the presets {', '.join(PRESETS)}")
    return read_config(Path(name))


def make_settings(stages: tuple[dict[str, Any], ...], given: Mapping[str, Any]) -> list[Settings]:
    """The settings of every stage; what is given by option holds in all of them.

    Raises:
      InputError: a stage's are senseless; it is numbered if there are several.
    """
    made = []
    for number, stage in enumerate(stages, start=1):
        try:
            made.append(Settings(**stage | dict(given)))
        except InputError as error:
            where = f"stage {number}: " if len(stages) > 1 else ""
            raise InputError(f"{where}{error}") from None
    return made


def _to_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:  # which settings will say
        return math.inf if value > 0 else -math.inf


def _checked(values: Mapping[str, Any], where: str, *others: str) -> dict[str, Any]:
    """Settings with values of their types; `others` are keys that might have been meant."""
    unknown, known = sorted(values.keys() - _FIELDS), [*others, *_FIELDS]
    if unknown:
        near = [difflib.get_close_matches(key.replace("-", "_"), known, 1, 0.8) for key in unknown]
        meant = ", ".join(found[0] for found in near if found)
        listed = meant if all(near) else f"some of {', '.join(known)}"
        raise InputError(f"{where}unknown keys {', '.join(unknown)}, expected {listed}")
    checked = {}
    for name, value in values.items():
        kind = type(_FIELDS[name].default)
        if kind is float and type(value) is int:
            value = _to_float(value)
        if type(value) is not kind:
            expected = _EXPECTED[kind]
            raise InputError(f"{where}{name} is {value!r:.80}, expected {expected}")
        checked[name] = value
    return checked
