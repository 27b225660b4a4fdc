"""Several processes that run one program together, each on its own devices."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from glm5_jax.cluster import find_cluster, read_member
from glm5_jax.console import silence
from glm5_jax.coordination import end_at_exit, ending_together, require_same, within
from glm5_jax.errors import InputError
from glm5_jax.rendezvous import meet

Value = TypeVar("Value")

# What may be given to one process otherwise than to another, and the function of the command.
_OF_A_PROCESS = {"coordinator", "num_processes", "process_id", "start_timeout", "run"}
_HEARTBEAT = 60  # seconds of silence after which JAX takes a process for dead


def add_processes(command: argparse.ArgumentParser) -> None:
    """Adds the arguments that `one_program` reads."""
    group = command.add_argument_group(
        "several processes",
        "Start the same command once on every machine. Under Slurm, Open MPI and on TPU pods the\n"
        "first three are found out; JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID\n"
        "in the environment stand for them.",
    )
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="process 0, and a free port there"
    )
    group.add_argument("--num-processes", metavar="N", help="how many there are")
    group.add_argument("--process-id", metavar="I", help="which this is, from 0")
    group.add_argument(
        "--start-timeout", metavar="SECONDS", default="300", help="how long to wait for all of them"
    )


@contextlib.contextmanager
def one_program(args: argparse.Namespace) -> Iterator[None]:
    """Runs the body as one of the processes that the arguments or the cluster speak of.

    It prints once, ends in all processes or in none, and errors name the process.

    Raises:
      InputError: as the body does, or the processes do not come together, or were started with
        different arguments.
    """
    import jax

    start_processes(args)
    if not jax.distributed.is_initialized():
        yield
        return
    with ending_together(), only_first_prints():
        given = vars(args).items()
        same = {f"argument {name}": value for name, value in given if name not in _OF_A_PROCESS}
        require_same("arguments", same, int(args.start_timeout))
        yield


def start_processes(args: argparse.Namespace) -> None:
    """Connects the processes, if there are several; before anything touches a JAX backend.

    Raises:
      InputError: the arguments are wrong, or the other processes do not come in time.
    """
    member, seconds = read_member(args)
    cluster = find_cluster() if member is None else None
    if member is not None and member.total > 1:
        meet(member, seconds)
        # The cluster, if there is one, would leave each process one GPU.
        _connect(
            f"{member} at {member.address}",
            seconds,
            coordinator_address=member.address,
            num_processes=member.total,
            process_id=member.number,
            cluster_detection_method="deactivate",
        )
    elif cluster is not None:
        _connect(f"a process of {cluster}", seconds)


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    import jax

    return not jax.distributed.is_initialized() or jax.process_index() == 0


@contextlib.contextmanager
def on_first(
    context: Callable[[], contextlib.AbstractContextManager[Value]],
) -> Iterator[Value | None]:
    """Enters a context, such as a file to be written, in the first process; the others get None."""
    if not is_first():
        yield None
        return
    with context() as value:
        yield value


@contextlib.contextmanager
def only_first_prints() -> Iterator[None]:
    """What is printed and shown is that of the first process; what libraries write is not."""
    import jax

    if not jax.distributed.is_initialized():
        yield
        return
    sys.stdout.flush()
    before = os.dup(1)
    os.dup2(2, 1)  # NCCL and others report there, amid what may be JSON
    try:
        target: Any = os.dup(before) if is_first() else os.devnull
        if jax.default_backend() == "cpu":  # Gloo reports every connection
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
        encoding, at_once = sys.stdout.encoding, sys.stdout.isatty()
        with (
            open(target, "w", encoding=encoding, buffering=1 if at_once else -1) as stream,
            contextlib.redirect_stdout(stream),
            contextlib.nullcontext() if is_first() else silence(),
        ):
            yield
    finally:
        os.dup2(before, 1)
        os.close(before)


def _connect(who: str, seconds: int, **arguments: Any) -> None:
    """Runs `jax.distributed.initialize`, which would abort the process after its own timeout."""
    import jax

    # gRPC would look for the coordinator, a neighbour, beyond the proxy that is set for HTTP.
    os.environ.setdefault("grpc_proxy", "")
    jax.config.update("jax_check_proxy_envs", False)
    # It would catch SIGTERM, so that nothing but SIGKILL ends the process.
    jax.config.update("jax_enable_preemption_service", False)

    def initialize() -> None:
        jax.distributed.initialize(
            initialization_timeout=seconds + 60,
            heartbeat_timeout_seconds=_HEARTBEAT,
            **arguments,
        )

    try:
        in_time = within(seconds, initialize)
    except (RuntimeError, ValueError, KeyError, ImportError) as error:
        end_at_exit(2)
        raise InputError(f"{who} cannot be connected: {error!s:.500}") from None
    if not in_time:
        end_at_exit(2)
        raise InputError(
            f"{who} waited {seconds} s to be connected, expected all processes to be started, and "
            "to reach the coordinator, which is process 0"
        )
