"""Threads that move bytes between shards and chunks, with a bound on the memory they take."""

import concurrent.futures
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Result = TypeVar("Result")


class Stopped(Exception):
    """Raised in a thread that is to end because another one failed."""


class Pipeline:
    """A pool of threads that have no more than so many bytes in hand.

    A thread of its own follows each shard from start to end, because a digest is made in that
    order, and leaves the rest of the work on each portion to the pool.
    """

    def __init__(self, memory: int, num_threads: int):
        """Makes a pipeline.

        Args:
          memory: bytes that portions may take together; a single one may take more.
        """
        self._memory = memory
        self._taken = 0
        self._stopped = False
        self._error: BaseException | None = None  # the first one
        self._changed = threading.Condition()
        self._pool = concurrent.futures.ThreadPoolExecutor(num_threads)

    def take(self, count: int, *, wait: bool = True) -> bool:
        """Takes memory for a portion; waits until there is some, or returns whether there was.

        Raises:
          Exception: what another thread failed with.
        """
        with self._changed:
            while not self._stopped and self._taken and self._taken + count > self._memory:
                if not wait:
                    return False
                self._changed.wait()
            if self._stopped:
                raise self._error or Stopped
            self._taken += count
            return True

    def give_back(self, count: int) -> None:
        """Gives back memory that was taken."""
        with self._changed:
            self._taken -= count
            self._changed.notify_all()

    def submit(self, work: Callable[[], Result]) -> concurrent.futures.Future[Result]:
        """Has a thread of the pool do something; if that fails, all threads end."""
        return self._pool.submit(self._watched, work)

    def run(self, shards: Iterable[Callable[[], None]], num_threads: int) -> None:
        """Follows shards, several at a time, and returns when all have come to their end.

        Raises:
          Exception: whatever failed first.
        """
        with concurrent.futures.ThreadPoolExecutor(num_threads) as followers:
            for shard in shards:
                followers.submit(self._watched, shard)
        if self._error is not None:
            raise self._error

    def _watched(self, work: Callable[[], Result]) -> Result:
        try:
            if self._stopped:
                raise self._error or Stopped
            return work()
        except BaseException as error:
            self._stop(error)
            raise

    def _stop(self, error: BaseException | None) -> None:
        with self._changed:
            self._stopped = True
            if self._error is None and not isinstance(error, Stopped):
                self._error = error
            self._changed.notify_all()

    def close(self) -> None:
        """Ends the threads."""
        self._stop(None)
        self._pool.shutdown(cancel_futures=True)

    def ahead(self, portions: Iterable[tuple[int, Callable[[], Result]]]) -> Iterator[Result]:
        """Results in the order of their portions, which the pool works on ahead of the reader.

        Args:
          portions: for each, the memory that it takes and the work that makes it.
        """
        waiting: list[tuple[int, concurrent.futures.Future[Result]]] = []
        for count, work in portions:
            while waiting and not self.take(count, wait=False):
                yield from self._first(waiting)
            if not waiting:
                self.take(count)
            waiting.append((count, self.submit(work)))
        while waiting:
            yield from self._first(waiting)

    def _first(
        self, waiting: list[tuple[int, concurrent.futures.Future[Result]]]
    ) -> Iterator[Result]:
        count, future = waiting.pop(0)
        try:
            yield future.result()
        finally:
            self.give_back(count)
