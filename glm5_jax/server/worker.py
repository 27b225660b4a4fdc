"""The thread that owns the engine, as the event loop sees it."""

import asyncio
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

from glm5_jax.errors import InputError
from glm5_jax.inference.engine import Engine
from glm5_jax.inference.request import Event, Request, check_request
from glm5_jax.server.answer import Answer
from glm5_jax.server.errors import RETRY_SECONDS, ApiError, draining, failed
from glm5_jax.server.metrics import Metrics
from glm5_jax.server.orders import Cancellation, Desk, Order, Submission


class Worker:
    """Runs an engine in a thread of its own, from `start` to `stop`.

    Methods are called in the event loop; the thread reports to it by `_tell`.
    """

    def __init__(
        self,
        engine: Engine,
        queue: int,
        metrics: Metrics,
        relay: Callable[[Sequence[Order] | None], None] | None = None,
    ):
        """Prepares it.

        Args:
          queue: the most continuations that wait for a slot.
          relay: told all that the engine is, and the end by None, for those of other processes.
        """
        self.context, self.config = engine.context, engine.config
        self.failure: BaseException | None = None  # of the engine, after which nothing works
        self.draining = False
        self._desk, self._metrics = Desk(engine), metrics
        self._relay = relay
        self._room = engine.slots + queue
        self._tickets = itertools.count()
        self._open: dict[int, tuple[Answer, int]] = {}  # ticket -> whom its tokens are for
        self._empty = asyncio.Event()
        self._empty.set()
        self._orders: list[Order] = []
        self._ending = False
        self._changed = threading.Condition()  # guards the two above, which the threads share
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self, on_failure: Callable[[], None]) -> None:
        """Begins, in the running event loop; the function is called if the engine fails."""
        self._loop, self._on_failure = asyncio.get_running_loop(), on_failure
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread after the step that it is at."""
        self.draining = True
        with self._changed:
            self._ending = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join)

    async def drain(self, seconds: float) -> None:
        """Takes nothing new, and waits for what is open; what takes longer ends with an error."""
        self.draining = True
        try:
            async with asyncio.timeout(seconds):
                await self._empty.wait()
        except TimeoutError:
            self._fail_all(draining())

    def submit(self, requests: Sequence[Request], seconds: float) -> Answer:
        """Hands requests to the engine, to be answered within so many seconds.

        Raises:
          ApiError: they cannot be continued, the queue is full, or the server ends or has failed.
        """
        for request in requests:
            try:
                check_request(request, self.config.vocab_size, self.context, "the prompt")
            except InputError as error:
                raise ApiError(400, str(error)) from None
        self.check_room(len(requests))
        orders = [Submission(next(self._tickets), request) for request in requests]

        def give_up(place: int) -> None:
            if orders[place].ticket in self._open:
                self._close(orders[place].ticket)
                self._order(Cancellation(orders[place].ticket))

        answer = Answer(len(requests), seconds, give_up, self._metrics)
        self._open |= {order.ticket: (answer, place) for place, order in enumerate(orders)}
        self._empty.clear()
        self._order(*orders)
        return answer

    def check_room(self, count: int) -> None:
        """Raises `ApiError` if so many continuations cannot be taken now."""
        if self.failure is not None:
            raise failed()
        if self.draining:
            raise draining()
        if count > self._room:
            raise ApiError(
                400,
                f"{count} continuations were asked for at once, expected at most {self._room}",
                code="too_many_choices",
            )
        if len(self._open) + count > self._room:
            raise ApiError(
                429,
                f"{len(self._open)} continuations run or wait, expected at most {self._room} "
                f"with the {count} asked for",
                code="queue_full",
                headers={"Retry-After": str(RETRY_SECONDS)},
            )

    def _order(self, *orders: Order) -> None:
        with self._changed:
            self._orders += orders
            self._changed.notify()

    def _close(self, ticket: int) -> None:
        del self._open[ticket]
        if not self._open:
            self._empty.set()

    def _fail_all(self, error: ApiError) -> None:
        for answer in {answer for answer, _ in self._open.values()}:
            answer.fail(error)

    def _run(self) -> None:
        engine = self._desk.engine
        try:
            while (orders := self._gather()) is not None:
                if self._relay is not None:
                    self._relay(orders)
                self._desk.apply(orders)
                events = [] if engine.is_idle else self._desk.step()
                # First, so that who has an answer finds it counted.
                self._metrics.show(engine.statistics())
                self._tell(self._put, events)
            if self._relay is not None:
                self._relay(None)
        except BaseException as error:
            self._tell(self._fail, error)

    def _gather(self) -> list[Order] | None:
        """The orders since the last step, waited for if there is nothing else to do."""
        with self._changed:
            while not (self._ending or self._orders) and self._desk.engine.is_idle:
                self._changed.wait()
            orders, self._orders = self._orders, []
            return None if self._ending else orders

    def _tell(self, receive: Callable[[Any], None], report: Any) -> None:
        self._loop.call_soon_threadsafe(receive, report)

    def _put(self, events: Sequence[tuple[int, Event]]) -> None:
        for ticket, event in events:
            if ticket not in self._open:  # given up meanwhile
                continue
            answer, place = self._open[ticket]
            if event.finish_reason is not None:
                self._close(ticket)
            answer.put(place, event)

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        self._fail_all(failed())
        self._on_failure()
