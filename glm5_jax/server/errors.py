"""What clients are told when something is wrong, in the shape of OpenAI's API."""

from collections.abc import Mapping
from typing import Any

RETRY_SECONDS = 1  # after which a client may find room, or the server that replaces this one

GONE = 499  # how metrics call the answer to a client that did not wait for it


class ApiError(Exception):
    """An answer other than the one that was asked for."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        """Describes it.

        Args:
          status: of HTTP; tells who is to blame.
          code: a word for programs.
          param: the field of the request's body that is wrong.
        """
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self._fields = {"message": message, "type": _kind(status), "param": param, "code": code}

    def body(self) -> dict[str, Any]:
        """The JSON object that is answered."""
        return {"error": self._fields}


def _kind(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def unsupported(param: str, message: str) -> ApiError:
    """Something that OpenAI's API has and this server has not."""
    return ApiError(400, f"{param}: {message}", code="unsupported", param=param)


def draining() -> ApiError:
    """The server is about to end and takes nothing new."""
    return ApiError(
        503,
        "the server is shutting down",
        code="shutting_down",
        headers={"Retry-After": str(RETRY_SECONDS)},
    )


def timed_out(seconds: float) -> ApiError:
    """An answer took longer than the server allows; asking again would take as long."""
    return ApiError(
        504,
        f"the answer was not complete after {seconds:g} s, which is what a request may take",
        code="timeout",
        headers={"x-should-retry": "false"},  # OpenAI's clients would ask twice more
    )


def failed(status: int = 500) -> ApiError:
    """The engine broke; its error stands in the server's log."""
    return ApiError(status, "the engine failed", code="internal_error")
