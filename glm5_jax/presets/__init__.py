"""Known configs by name, each a published-style `config.json` beside this file."""

from pathlib import Path

from glm5_jax.config_json import PublishedConfig, read_config
from glm5_jax.errors import InputError

# GLM-5.1 and 5.3 are further-trained GLM-5 and 5.2: their configs differ in no model key.
_SAME_MODEL = {"glm-5.1": "glm-5", "glm-5.3": "glm-5.2"}
_FOLDER = Path(__file__).parent

PRESETS = tuple(sorted({path.stem for path in _FOLDER.glob("*.json")} | _SAME_MODEL.keys()))


def load_preset(name: str) -> PublishedConfig:
    """The config of a preset.

    Raises:
      InputError: there is no preset of that name.
    """
    if name not in PRESETS:
        raise InputError(f"preset {name!r} is not known, expected one of {', '.join(PRESETS)}")
    return read_config(_FOLDER / f"{_SAME_MODEL.get(name, name)}.json")
