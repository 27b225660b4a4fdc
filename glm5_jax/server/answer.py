"""The tokens that belong to one HTTP request."""

import asyncio
from collections.abc import Callable
from typing import Self

from glm5_jax.inference.request import Event
from glm5_jax.server.errors import ApiError, timed_out
from glm5_jax.server.metrics import Metrics


class Answer:
    """The tokens of several continuations, as they come.

    An asynchronous context, which frees their slots however it is left.
    """

    def __init__(
        self, count: int, seconds: float, give_up: Callable[[int], None], metrics: Metrics
    ):
        """Begins to wait.

        Args:
          count: of continuations, which are known by their places.
          seconds: that it may take in all.
          give_up: frees the slot of a place.
        """
        loop = asyncio.get_running_loop()
        self._seconds, self._give_up, self._metrics = seconds, give_up, metrics
        self._start = loop.time()
        self._running = set(range(count))
        self._first: dict[int, float] = {}  # when the first token of a place came
        self._after: dict[int, int] = {}  # tokens that came after it
        self._arrived: asyncio.Queue[tuple[int, Event] | ApiError] = asyncio.Queue()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, Event]:
        """The next token and its place.

        Raises:
          ApiError: the time is over, or the server ends or fails.
        """
        while self._running:
            try:
                async with asyncio.timeout_at(self._start + self._seconds):
                    arrived = await self._arrived.get()
            except TimeoutError:
                raise timed_out(self._seconds) from None
            if isinstance(arrived, ApiError):
                raise arrived
            place, event = arrived
            if place in self._running:
                if event.finish_reason is not None:
                    self._running.remove(place)
                return place, event
        raise StopAsyncIteration

    def cancel(self, place: int) -> None:
        """Gives up one continuation; nothing if it has ended."""
        if place in self._running:
            self._running.remove(place)
            self._give_up(place)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for place in sorted(self._running):
            self.cancel(place)

    def put(self, place: int, event: Event) -> None:
        """Adds a token."""
        now = asyncio.get_running_loop().time()
        if place not in self._first:
            self._first[place], self._after[place] = now, 0
            self._metrics.first_token.observe(now - self._start)
        else:
            self._after[place] += 1
        count = self._after[place]
        if event.finish_reason is not None and count:
            self._metrics.per_token.observe((now - self._first[place]) / count)
        self._arrived.put_nowait((place, event))

    def fail(self, error: ApiError) -> None:
        """Ends the answer with an error."""
        self._arrived.put_nowait(error)
