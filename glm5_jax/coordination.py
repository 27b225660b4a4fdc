"""What the processes of one program have to say to each other, apart from their devices.

Whatever fails in one of them has to end the others, which would otherwise wait for it in a
collective: JAX notices a process that went away by its missing heartbeats, and a process that ends
as Python does, after an error, waits for the others instead. So a process that fails says so to
the coordinator, where the others look, and ends at once.
"""

import atexit
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

from glm5_jax.atomic import remove_unfinished
from glm5_jax.errors import InputError

_LOOK = 0.5  # seconds between looks at whether another process failed
LONGEST = 7 * 24 * 3600  # seconds that the first to finish wait for the last
_FAILED = "glm5/failed"
_TOLD, _REMEMBERED = "glm5/told", 1024  # messages of the first process, and how many are kept


def said_by_all(topic: str, text: str, seconds: float) -> list[str]:
    """What each process says on a topic, in their order; no device takes part.

    Args:
      topic: not used before.

    Raises:
      InputError: some process did not get here in time; it is named.
    """
    import jax

    if not jax.distributed.is_initialized():
        return [text]
    client, index, count = _coordination()
    client.key_value_set(f"glm5/said/{topic}/{index}", text)
    try:
        client.wait_at_barrier(f"glm5/said/{topic}", timeout_in_ms=round(seconds * 1000))
        arrived = True
    except jax.errors.JaxRuntimeError:
        arrived = False
    pairs = client.key_value_dir_get(f"glm5/said/{topic}/")
    said = {int(key.rpartition("/")[2]): value for key, value in pairs}
    missing = [str(other) for other in range(count) if other not in said]
    if missing or not arrived:
        raise InputError(
            f"waited {seconds:g} s at {topic!r} for process {', '.join(missing) or '(unknown)'}, "
            f"expected all {count} to get there"
        )
    return [said[other] for other in range(count)]


def require_same(topic: str, values: Mapping[str, object], seconds: float) -> None:
    """Checks that all processes go by the same values, by name; else they would wait for ever.

    Args:
      topic: as in `said_by_all`.

    Raises:
      InputError: a value differs; it is named with what two processes have.
    """
    text = json.dumps({name: str(value) for name, value in values.items()})
    first, *others = map(json.loads, said_by_all(topic, text, seconds))
    for number, other in enumerate(others, start=1):
        for name, value in first.items():
            if other.get(name) != value:
                raise InputError(
                    f"{name} is {value!r:.80} in process 0 and {other.get(name)!r:.80} in process "
                    f"{number}, expected the same in all"
                )


class Relay:
    """What the first process tells all others, message after message."""

    def __init__(self) -> None:
        self._count = 0

    def tell(self, text: str) -> None:
        """Says something, in the first process. It waits for nobody."""
        client, _, count = _coordination()
        if count > 1:
            client.key_value_set(f"{_TOLD}/{self._count}", text)
            # Whoever is told to use the devices cannot be so far behind.
            if self._count >= _REMEMBERED:
                client.key_value_delete(f"{_TOLD}/{self._count - _REMEMBERED}")
        self._count += 1

    def hear(self) -> str:
        """Waits for the next message, in another process."""
        import jax

        client, _, _ = _coordination()
        while True:
            try:
                text: str = client.blocking_key_value_get(f"{_TOLD}/{self._count}", 60_000)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
                later = client.key_value_dir_get(f"{_TOLD}/")
                if later and f"{_TOLD}/{self._count}" not in dict(later):
                    raise RuntimeError("what the first process told was forgotten") from None
                continue  # there was nothing to say
            self._count += 1
            return text


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Ends the body in all processes or in none; its errors name the process."""
    client, index, count = _coordination()
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(done,), daemon=True)
    watcher.start()
    try:
        with _signals_reported():
            yield
            # Past a time limit of its own, JAX takes processes that have not ended for dead.
            client.wait_at_barrier("glm5/end", timeout_in_ms=LONGEST * 1000)
    except BaseException as error:
        done.set()
        watcher.join()
        _end_if_another_failed()
        text, status = _describe(error)
        _report(text)
        end_at_exit(status)
        if isinstance(error, (InputError, OSError)) and not isinstance(error, BrokenPipeError):
            raise InputError(f"process {index} of {count}: {text}") from None
        raise
    finally:
        done.set()
        watcher.join()


def _describe(error: BaseException) -> tuple[str, int]:
    """An error in words, and the exit status that `run_command` gives it."""
    if isinstance(error, BrokenPipeError):
        return "nobody reads its output", 0
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}", 2
    if isinstance(error, (InputError, OSError)):
        return str(error), 2
    return f"{type(error).__name__}: {error}", 1


def _watch(done: threading.Event) -> None:
    while not done.wait(_LOOK):
        _end_if_another_failed()


def _end_if_another_failed() -> None:
    """Ends this process if so; whatever it does is in vain, and fails for that reason."""
    import jax

    client, index, count = _coordination()
    try:
        reason = client.key_value_try_get(_FAILED)
    except jax.errors.JaxRuntimeError:  # there is no such key
        return
    remove_unfinished()
    print(f"process {index} of {count}: ended, because {reason}", file=sys.stderr, flush=True)
    if index == 0:
        time.sleep(2 * _LOOK)  # the coordinator ends with it, and the others are to look first
    os._exit(2)


def _report(reason: str) -> None:
    """Tells the other processes that this one fails."""
    import jax

    client, index, _ = _coordination()

    def tell() -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was faster
            text = " ".join(f"process {index} failed: {reason}".split())
            client.key_value_set(_FAILED, text[:1000])

    within(2, tell)
    if index == 0:
        time.sleep(2 * _LOOK)


@contextlib.contextmanager
def _signals_reported() -> Iterator[None]:
    """Tells the others of a signal before this process ends by it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def end(number: int, frame: FrameType | None) -> None:
        _report(f"it was ended by {signal.Signals(number).name}")
        handler = before[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)
        os._exit(128 + number)

    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def within(seconds: float, function: Callable[[], None]) -> bool:
    """Whether a function that may hang for ever returned in time; its error is raised here.

    If it did not, it is still running, and the caller has to see to it that the process ends.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    return not thread.is_alive()


def end_at_exit(status: int) -> None:
    """Has the interpreter end at once when it exits; JAX would wait for the other processes."""

    def end() -> None:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)

    atexit.register(end)


def _coordination() -> tuple[Any, int, int]:
    """The client of JAX's coordinator, the number of this process, and of how many.

    It is not public; Orbax, which relies on it too, offers barriers only. Unlike
    `jax.process_index`, it does not wait for devices.
    """
    from jax._src.distributed import global_state

    return global_state.client, global_state.process_id, global_state.num_processes
