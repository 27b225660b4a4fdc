"""Processes of one program, started together on this machine, each with four devices."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tests.flags import xla_flags


class Ended(NamedTuple):
    """How a process ended."""

    status: int
    output: str
    errors: str


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def started_together(*commands, folders=None):
    """Modules with their arguments, one process each; killed at the end if they still run."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(4)}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    flags = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", str(len(commands))]
    flags += ["--start-timeout", "150", "--process-id"]
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", *map(str, command), *flags, str(number)],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=environment,
                    cwd=folders and folders[number],
                )
            )
            for number, command in enumerate(commands)
        ]
        for process in started:  # whatever happens, none is waited for any longer
            stack.callback(process.kill)
        yield started


def run_together(*commands, folders=None, seconds=300):
    """The same, until they have ended: how each did."""
    with started_together(*commands, folders=folders) as started:
        outputs = [process.communicate(timeout=seconds) for process in started]
    return [Ended(p.returncode, *text) for p, text in zip(started, outputs, strict=True)]
