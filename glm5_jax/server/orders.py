"""What the engine is told between two steps, in every process that shares the model."""

import contextlib
import json
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from glm5_jax.inference.engine import Engine
from glm5_jax.inference.request import Event, Request, Sampling


class Submission(NamedTuple):
    """An order to continue a prompt."""

    ticket: int  # the number by which whoever gives the order knows it
    request: Request


class Cancellation(NamedTuple):
    """An order to give up a submission."""

    ticket: int


Order = Submission | Cancellation


class Desk:
    """An engine that takes orders, and answers by their tickets.

    Equal orders between equal steps leave equal engines: processes that share a model apply the
    same.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._requests: dict[int, int] = {}  # ticket -> the engine's number
        self._tickets: dict[int, int] = {}  # and back

    def apply(self, orders: Sequence[Order]) -> None:
        """Carries out orders; requests are such as the engine takes."""
        for order in orders:
            if isinstance(order, Submission):
                number = self.engine.submit(order.request)
                self._requests[order.ticket], self._tickets[number] = number, order.ticket
            elif order.ticket in self._requests:
                self.engine.cancel(self._forget(order.ticket))

    def step(self) -> list[tuple[int, Event]]:
        """The tokens of one step, each with the ticket that it is for."""
        events = [(self._tickets[event.request], event) for event in self.engine.step()]
        for ticket, event in events:
            if event.finish_reason is not None:
                self._forget(ticket)
        return events

    def _forget(self, ticket: int) -> int:
        number = self._requests.pop(ticket)
        del self._tickets[number]
        return number


_END = "end"


def to_text(orders: Sequence[Order] | None) -> str:
    """Orders as one process tells them to others; None is the end."""
    if orders is None:
        return _END
    return json.dumps([_to_json(order) for order in orders])


def from_text(text: str) -> list[Order] | None:
    """The orders that a process told."""
    return None if text == _END else [_from_json(each) for each in json.loads(text)]


def follow(desk: Desk, hear: Callable[[], str]) -> None:
    """Does what the process that talks with clients does, as it tells it, until the end.

    Signals are for that process: it lets all others know.
    """
    with _deaf():
        while (orders := from_text(hear())) is not None:
            desk.apply(orders)
            if not desk.engine.is_idle:
                desk.step()


def _to_json(order: Order) -> dict[str, Any]:
    if isinstance(order, Cancellation):
        return {"ticket": order.ticket}
    request = vars(order.request)
    sampling = vars(order.request.sampling)
    bias = list(order.request.sampling.logit_bias.items())
    return {
        "ticket": order.ticket,
        "request": request | {"stop": sorted(order.request.stop), "sampling": None},
        "sampling": sampling | {"logit_bias": bias},
    }


def _from_json(told: dict[str, Any]) -> Order:
    if "request" not in told:
        return Cancellation(told["ticket"])
    sampling = Sampling(**told["sampling"] | {"logit_bias": dict(told["sampling"]["logit_bias"])})
    request = told["request"] | {
        "prompt": tuple(told["request"]["prompt"]),
        "stop": frozenset(told["request"]["stop"]),
        "sampling": sampling,
    }
    return Submission(told["ticket"], Request(**request))


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
