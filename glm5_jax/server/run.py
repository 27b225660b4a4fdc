"""Running the application until it is told to end."""

import asyncio
import os
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from glm5_jax.errors import InputError
from glm5_jax.server.app import build_app
from glm5_jax.server.service import Service

_LAST_WORDS = 5  # seconds for clients to read the ends of answers


class Server(uvicorn.Server):
    """Answers what has begun when it is told to end, and ends at once when told again."""

    def __init__(self, service: Service, announce: Callable[[], None]):
        """Prepares it; `run` serves at the sockets that it is given.

        Args:
          announce: called once requests are taken.
        """
        super().__init__(
            uvicorn.Config(
                build_app(service, self._end),
                loop="asyncio",
                http="h11",
                ws="none",
                lifespan="on",
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_LAST_WORDS,
            )
        )
        self._worker, self._announce = service.worker, announce
        self._drain_seconds = service.limits.drain_seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._told = False

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serves until the end; raises if the engine fails."""
        super().run(sockets)
        if self._worker.failure is not None:
            raise RuntimeError("the engine failed") from self._worker.failure

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self._announce()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Is told to end, by a signal."""
        if self._told:
            os._exit(128 + sig)
        self._told = True
        if self._loop is None:
            self._end()
        else:
            self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._draining = asyncio.ensure_future(self._worker.drain(self._drain_seconds))
        self._draining.add_done_callback(lambda _: self._end())

    def _end(self) -> None:
        self.should_exit = True


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket at an address; 0 is any port that is free.

    Raises:
      InputError: there is no such address here, or somebody else has it.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise _no_address(host, port, error) from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _no_address(host, port, error) from None
    return bound


def _no_address(host: str, port: int, error: Exception) -> InputError:
    return InputError(f"--host {host!r:.80} and --port {port}: {error}")
