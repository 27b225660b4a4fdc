"""Programs that take turns on one machine: each in a process of its own, run when told to.

So neither has the other's threads, allocator or caches beside it, and a slow moment of a shared
machine falls on both.
"""

import contextlib
import dataclasses
import gc
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from glm5_jax.errors import InputError

# Makes a program: what it returns runs it once, waits until it is done, and returns its output.
Maker = Callable[..., Callable[[], np.ndarray]]


class Lap(NamedTuple):
    """How long one run took."""

    seconds: float
    cpu_seconds: float  # of all threads


class Failed(InputError):
    """A program ended with an error; the text says which."""


@dataclasses.dataclass
class Contender:
    """A program that is ready to run."""

    process: Any
    connection: Connection
    seconds_to_prepare: float  # imports, weights, compilation and the first run
    output: np.ndarray  # of the first run

    def run(self, times: int = 1) -> Lap:
        """Runs it; the mean of some runs in a row."""
        return Lap(*self._ask("run", times))

    def peak(self) -> float:
        """Runs it once; the most memory that its process had meanwhile, in bytes."""
        return float(self._ask("peak", 1))

    def _ask(self, what: str, times: int) -> Any:
        self.connection.send((what, times))
        return _receive(self.connection)


@contextlib.contextmanager
def contender(make: Maker, *arguments: Any, cores: int | None = None) -> Iterator[Contender]:
    """A program in a process of its own, which ends with the block.

    Args:
      make: of a module that can be imported there.
      cores: how many it may use; all of them unless given.

    Raises:
      Failed: it could not be made.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    process = context.Process(target=_work, args=(there, make, arguments, allowed), daemon=True)
    began = time.perf_counter()
    process.start()
    there.close()
    try:
        output = _receive(here)
        yield Contender(process, here, time.perf_counter() - began, output)
    finally:
        here.close()
        process.join(10)
        process.kill()


def _receive(connection: Connection) -> Any:
    try:
        failed, answer = connection.recv()
    except EOFError:
        raise Failed("its process died") from None
    if failed:
        raise Failed(answer)
    return answer


def _work(
    connection: Connection, make: Maker, arguments: tuple[Any, ...], cores: list[int]
) -> None:
    try:
        os.sched_setaffinity(0, cores)
        program = make(*arguments)
        connection.send((False, program()))
        while True:
            what, times = connection.recv()
            connection.send((False, _peak(program) if what == "peak" else _lap(program, times)))
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:  # whatever it is, the one who waits must hear of it
        connection.send((True, f"{type(error).__name__}: {error}"))


def _lap(program: Callable[[], Any], times: int) -> Lap:
    began, used = time.perf_counter(), time.process_time()
    for _ in range(times):
        program()
    return Lap((time.perf_counter() - began) / times, (time.process_time() - used) / times)


def _peak(program: Callable[[], Any]) -> int:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
    program()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status has no VmHWM")


class Result(NamedTuple):
    """What was measured of one contender."""

    laps: list[Lap]
    seconds_to_prepare: float
    output: np.ndarray

    @property
    def seconds(self) -> float:
        """The median of the laps."""
        return statistics.median(lap.seconds for lap in self.laps)

    @property
    def cpu_seconds(self) -> float:
        """The median of the laps."""
        return statistics.median(lap.cpu_seconds for lap in self.laps)

    @property
    def spread(self) -> float:
        """The slowest lap over the fastest."""
        times = [lap.seconds for lap in self.laps]
        return max(times) / min(times)


def take_turns(
    makers: Mapping[str, tuple[Any, ...]], rounds: int, lap_seconds: float, cores: int | None = None
) -> dict[str, Result]:
    """Runs programs in turns, A B A B.

    Args:
      makers: by name, a `Maker` and its arguments.
      lap_seconds: about how long a lap is to take; a long run is a lap by itself.
    """
    with contextlib.ExitStack() as stack:
        ready = {
            name: stack.enter_context(contender(*maker, cores=cores))
            for name, maker in makers.items()
        }
        laps: dict[str, list[Lap]] = {name: [] for name in ready}
        times = {name: _times(each, lap_seconds) for name, each in ready.items()}
        for _ in range(rounds):
            for name, each in ready.items():
                laps[name].append(each.run(times[name]))
        return {
            name: Result(laps[name], each.seconds_to_prepare, each.output)
            for name, each in ready.items()
        }


def _times(each: Contender, lap_seconds: float) -> int:
    """How many runs make a lap. It also warms up."""
    return max(1, round(lap_seconds / each.run().seconds))
