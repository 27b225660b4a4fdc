"""What a model's `generation_config.json` says about generating."""

from pathlib import Path
from typing import Any

from glm5_jax.errors import InputError
from glm5_jax.inference.request import Sampling
from glm5_jax.strict_json import read_json


def stop_tokens(directory: Path, eos_ids: tuple[int, ...]) -> frozenset[int]:
    """The tokens that end a text: those of the file, else those of the model's config.

    Raises:
      InputError: the file is damaged.
    """
    path, values = _read(directory)
    listed = values.get("eos_token_id")
    if listed is None:
        return frozenset(eos_ids)
    ids = listed if isinstance(listed, list) else [listed]
    if not all(type(token) is int for token in ids):
        raise InputError(f"{path}: eos_token_id is {listed!r:.80}, expected token ids")
    return frozenset(ids)


def usual_sampling(directory: Path) -> Sampling:
    """How the model's own file has tokens drawn; what it does not say is 1, as in OpenAI's API.

    Raises:
      InputError: the file is damaged, or has a value that there cannot be.
    """
    path, values = _read(directory)
    usual = {}
    for name in ("temperature", "top_p"):
        usual[name] = 1.0 if values.get(name) is None else values[name]
        if type(usual[name]) not in (int, float):
            raise InputError(f"{path}: {name} is {usual[name]!r:.80}, expected a number")
    try:
        return Sampling(temperature=usual["temperature"], top_p=usual["top_p"])
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _read(directory: Path) -> tuple[Path, dict[str, Any]]:
    path = directory / "generation_config.json"
    return path, read_json(path) if path.is_file() else {}
