"""Programs that take turns on one machine: each in a process of its own, run when told to.

So neither has the other's threads, allocator or caches beside it, and a slow moment of a shared
machine falls on both.
"""

import contextlib
import dataclasses
import gc
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from glm5_jax.errors import InputError


class Program(NamedTuple):
    """What takes turns with others."""

    run: Callable[[], object]  # once, until it is done
    output: Callable[[], np.ndarray]  # what it computes, for comparisons; takes no turn


# Makes a program, in the process that is to run it.
Maker = Callable[..., Program]

# Programs of which a run takes this many seconds are run so often only, every run counted.
_LONG_SECONDS, _FEW_ROUNDS = 20.0, 3
# What a gradient allocates comes faster so, of both programs.
_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
# Of the environment, what would have JAX do something else than it does by itself.
_JAX_SETTINGS = ("XLA_FLAGS", "JAX_ENABLE_X64", "JAX_COMPILATION_CACHE_DIR")


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
    seconds_to_prepare: float  # imports, weights, compilation and the output
    output: np.ndarray

    def run(self, times: int = 1) -> Lap:
        """Runs it; the mean of some runs in a row.

        Raises:
          Failed: it ended with an error.
        """
        return Lap(*self._ask("run", times))

    def peak(self) -> float:
        """Runs it once; the most memory that its process had meanwhile, in bytes."""
        return float(self._ask("peak", 1))

    def _ask(self, what: str, times: int) -> Any:
        try:
            self.connection.send((what, times))
        except OSError:
            raise Failed("its process died") from None
        return _receive(self.connection)


@contextlib.contextmanager
def contender(
    make: Maker, *arguments: Any, cores: int | None = None, huge_pages: bool = False
) -> Iterator[Contender]:
    """A program in a process of its own, which ends with the block.

    Args:
      make: of a module that can be imported there.
      cores: how many it may use; all of them unless given.
      huge_pages: whether glibc is to ask the kernel for them.

    Raises:
      Failed: it could not be made.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    process = context.Process(target=_work, args=(there, make, arguments, allowed), daemon=True)
    began = time.perf_counter()
    with mock.patch.dict(os.environ):
        # JAX, which comes with the program's module, looks at them when it is imported.
        for name in ("GLIBC_TUNABLES", *_JAX_SETTINGS):
            os.environ.pop(name, None)
        os.environ.update(_HUGE_PAGES if huge_pages else {})
        os.environ["JAX_PLATFORMS"] = "cpu"  # where torch is, too
        process.start()
    there.close()
    try:
        output = _receive(here)
        yield Contender(process, here, time.perf_counter() - began, output)
    finally:
        here.close()
        process.join(10)
        process.kill()


def output_of(make: Maker, *arguments: Any, cores: int | None = None) -> np.ndarray:
    """What a program computes, in a process that is there for this only.

    Raises:
      Failed: it could not be made.
    """
    with contender(make, *arguments, cores=cores) as each:
        return each.output


def _receive(connection: Connection) -> Any:
    try:
        failed, answer = connection.recv()
    except (EOFError, OSError):
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
        connection.send((False, program.output()))
        while True:
            what, times = connection.recv()
            found = _peak(program.run) if what == "peak" else _lap(program.run, times)
            connection.send((False, found))
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:  # whatever it is, the one who waits must hear of it
        connection.send((True, f"{type(error).__name__}: {error}"))


def _lap(run: Callable[[], object], times: int) -> Lap:
    began, used = time.perf_counter(), time.process_time()
    for _ in range(times):
        run()
    return Lap((time.perf_counter() - began) / times, (time.process_time() - used) / times)


def _peak(run: Callable[[], object]) -> int:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
    run()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status has no VmHWM")


class Result(NamedTuple):
    """What was measured of one contender."""

    laps: list[Lap]
    seconds_to_prepare: float
    output: np.ndarray
    peak: float = math.nan  # bytes, where it was asked for

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
    makers: Mapping[str, tuple[Any, ...]],
    rounds: int,
    lap_seconds: float,
    cores: int | None = None,
    *,
    with_peaks: bool = False,
    huge_pages: bool = False,
) -> dict[str, Result]:
    """Runs programs in turns, A B A B.

    Each begins its turn with a run that is not counted, unless some take long: while another runs,
    caches go cold and a virtual machine gives freed memory back to its host, which programs that
    run on do not meet.

    Args:
      makers: by name, a `Maker` and its arguments.
      rounds: laps of each, fewer if one takes long.
      lap_seconds: about how long a lap is to take; a long run is a lap by itself.
      with_peaks: whether each is run once more, for the most memory that it takes.
      huge_pages: as in `contender`, of all of them.
    """
    with contextlib.ExitStack() as stack:
        ready = {
            name: stack.enter_context(contender(*maker, cores=cores, huge_pages=huge_pages))
            for name, maker in makers.items()
        }
        laps: dict[str, list[Lap]] = {name: [] for name in ready}
        seconds: dict[str, float] = {}
        for name, each in ready.items():
            each.run()  # may compile what the output did not need
            seconds[name] = each.run().seconds
        times = {name: max(1, round(lap_seconds / seconds[name])) for name in ready}
        takes_long = max(seconds.values()) > _LONG_SECONDS
        if takes_long:
            rounds = min(rounds, _FEW_ROUNDS)
        for _ in range(rounds):
            for name, each in ready.items():
                if not takes_long:
                    each.run()
                laps[name].append(each.run(times[name]))
        return {
            name: Result(
                laps[name],
                each.seconds_to_prepare,
                each.output,
                each.peak() if with_peaks else math.nan,
            )
            for name, each in ready.items()
        }
