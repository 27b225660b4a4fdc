"""JSON from untrusted files: duplicate keys and non-finite numbers are errors."""

import json
import math
from typing import Any

from glm5_jax.errors import InputError
from glm5_jax.plain_files import read_plain
from glm5_jax.remote import AnyPath


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise InputError(f"key {key!r:.80} stands twice")
        result[key] = value
    return result


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise InputError(f"number {text:.80} is not finite")
    return value


def parse_value(text: str | bytes) -> Any:
    """Parses any JSON value.

    Raises:
      InputError: the text is not one with unique keys and finite numbers.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_object, parse_float=_number, parse_constant=_number
        )
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON: {error}") from None


def parse_json(text: str | bytes | memoryview, where: str) -> dict[str, Any]:
    """Parses a JSON object; `where` names the source in errors.

    Raises:
      InputError: the text is not one JSON object with unique keys and finite numbers.
    """
    try:
        value = parse_value(str(text, "utf-8") if isinstance(text, memoryview) else text)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def read_json(path: AnyPath) -> dict[str, Any]:
    """Reads a JSON object from a file; raises `InputError` as `parse_json` does."""
    return parse_json(read_plain(path), str(path))
