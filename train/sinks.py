"""Where the numbers of a run go besides its metrics file: TensorBoard and Weights & Biases."""

import contextlib
import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from glm5_jax.errors import InputError

TENSORBOARD_NAME = "tensorboard"
WANDB_ID_NAME = "wandb_id"

# Takes the numbers of a step by name.
_Write = Callable[[int, dict[str, float]], None]


class Sinks:
    """Passes records on; to nowhere, if nothing was asked for."""

    def __init__(self, writes: list[_Write]):
        self._writes = writes

    def write(self, record: Mapping[str, Any]) -> None:
        """Passes on the numbers of a step. What is missing or not finite is left out."""
        if self._writes:
            numbers = dict(_numbers(record))
            for write in self._writes:
                write(record["step"], numbers)


@contextlib.contextmanager
def open_sinks(
    run: Path, tensorboard: bool, wandb: str | None, settings: Mapping[str, Any]
) -> Iterator[Sinks]:
    """Opens what is asked for; a run that goes on is the same run there.

    Args:
      run: its folder; event files go to RUN/tensorboard.
      wandb: the project, of whoever is logged in; `WANDB_MODE=offline` keeps it on this machine.
      settings: that wandb shows of the run.

    Raises:
      InputError: a package is missing, or wandb refuses.
    """
    with contextlib.ExitStack() as stack:
        writes = []
        if tensorboard:
            writes.append(stack.enter_context(_tensorboard(run)))
        if wandb is not None:
            writes.append(stack.enter_context(_wandb(run, wandb, settings)))
        yield Sinks(writes)


def _numbers(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a record by name: those of a list as name/00 and so on.

    Tables, which experts' loads are, have too many numbers to follow one by one.
    """
    for name, value in record.items():
        of_list = value if isinstance(value, list) else []
        named = {f"{name}/{place:02d}": part for place, part in enumerate(of_list)}
        for key, part in (named or {name: value}).items():
            is_number = isinstance(part, int | float) and not isinstance(part, bool)
            if key != "step" and is_number and math.isfinite(part):
                yield key, float(part)


@contextlib.contextmanager
def _tensorboard(run: Path) -> Iterator[_Write]:
    with _required("tensorboard"):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(run / TENSORBOARD_NAME))
    is_started = False

    def write(step: int, numbers: dict[str, float]) -> None:
        nonlocal is_started
        now = time.time()
        if not is_started:
            # Readers forget what an earlier file says of this step and later ones.
            start = SessionLog(status=SessionLog.START)
            writer.add_event(Event(wall_time=now, step=step, session_log=start))
            is_started = True
        values = [Summary.Value(tag=name, simple_value=x) for name, x in numbers.items()]
        writer.add_event(Event(wall_time=now, step=step, summary=Summary(value=values)))
        writer.flush()  # or a run that is killed leaves a gap before its last checkpoint

    with contextlib.closing(writer):
        yield write


@contextlib.contextmanager
def _wandb(run: Path, project: str, settings: Mapping[str, Any]) -> Iterator[_Write]:
    with _required("wandb"):
        import wandb

    id_path = run / WANDB_ID_NAME
    if not id_path.exists():
        id_path.write_text(uuid.uuid4().hex + "\n")
    try:
        # Of steps that are taken again wandb keeps the first numbers.
        logged = wandb.init(
            project=project,
            id=id_path.read_text().strip(),
            resume="allow",
            name=run.resolve().name,
            dir=str(run),
            config=dict(settings),
        )
    except wandb.Error as error:
        raise InputError(f"wandb: {error}") from None
    with logged:
        yield lambda step, numbers: logged.log(numbers, step=step)


@contextlib.contextmanager
def _required(package: str) -> Iterator[None]:
    """Names the extra that has a package, where it is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise InputError(
            f"the package {package} is missing: pip install 'glm5-jax[{package}]'"
        ) from None
