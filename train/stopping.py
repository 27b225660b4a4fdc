"""Ending a run early when it is asked to, after the step it is at."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glm5_jax.collectives import MESH_AXES

Asked = Callable[[], signal.Signals | None]


@contextlib.contextmanager
def asked_to_stop(mesh: Mesh) -> Iterator[Asked]:
    """Has SIGTERM and SIGINT ask for an end while in the body; a second one ends the process.

    Yields a function that says which of them has come, to this process or another. All have to call
    it at the same step, and get the same.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        came.append(number)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, ask)
    try:
        largest = _largest_of_all(mesh)

        def asked() -> signal.Signals | None:
            number = largest(came[0] if came else 0)
            return signal.Signals(number) if number else None

        yield asked
    finally:
        restore()


def _largest_of_all(mesh: Mesh) -> Callable[[int], int]:
    """A function that gives the largest of the numbers that the processes give to it."""
    if jax.process_count() == 1:
        return lambda number: number
    one_each = NamedSharding(mesh, PartitionSpec(MESH_AXES))
    largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def of_all(number: int) -> int:
        own = np.array([number], np.int32)
        return int(largest(jax.make_array_from_callback((mesh.size,), one_each, lambda _: own)))

    return of_all
