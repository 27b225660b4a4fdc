"""Reading the bodies of requests."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from glm5_jax.errors import InputError
from glm5_jax.server.errors import ApiError
from glm5_jax.strict_json import parse_json

Model = TypeVar("Model", bound=BaseModel)

_SECONDS = 30  # for a body to come


async def read_body(request: Request, most: int) -> bytes:
    """The body of a request.

    Raises:
      ApiError: it has, or says that it has, more than `most` bytes, or does not come in time.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > most:
        raise _too_large(most)
    data = bytearray()
    try:
        async with asyncio.timeout(_SECONDS):
            async for chunk in request.stream():
                data += chunk
                if len(data) > most:
                    raise _too_large(most)
    except TimeoutError:
        raise ApiError(
            408, f"the body was not complete after {_SECONDS} s", code="timeout"
        ) from None
    return bytes(data)


def _too_large(most: int) -> ApiError:
    return ApiError(
        413, f"the body has more than {most} bytes, expected at most that", code="too_large"
    )


def parsed(model: type[Model], data: bytes) -> Model:
    """A body as a model; a null is as good as a field that is not there.

    Raises:
      ApiError: it is no JSON object, or a field is unknown, missing or wrong.
    """
    known = model.model_fields
    fields = _parse_object(data).items()
    given = {name: value for name, value in fields if value is not None or name not in known}
    try:
        return model.model_validate(given)
    except ValidationError as caught:
        errors = caught.errors(include_url=False, include_context=False)
    # A field that is missing may be there under a wrong name.
    raise _described(min(errors, key=lambda error: error["type"] != "extra_forbidden"))


def _parse_object(data: bytes) -> dict[str, Any]:
    try:
        value = parse_json(data, "the body")
        # Half of a surrogate pair can be written in JSON, but not sent on or tokenized.
        json.dumps(value, ensure_ascii=False).encode()
    except InputError as error:
        raise ApiError(400, str(error), code="invalid_json") from None
    except UnicodeEncodeError:
        raise ApiError(
            400, "the body has text that is not valid Unicode", code="invalid_json"
        ) from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from None
    return value


def _described(error: Mapping[str, Any]) -> ApiError:
    """What pydantic found wrong, on one line."""
    path = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return ApiError(
            400, f"{path} is no field of this request", code="unknown_field", param=path
        )
    expected = error["msg"].removeprefix("Value error, ")
    scalar = isinstance(error["input"], str | int | float) and error["type"] != "missing"
    found = f" is {error['input']!r:.80}" if scalar else ""
    return ApiError(
        400, f"{path or 'the body'}{found}: {expected}", code="invalid_value", param=path or None
    )
