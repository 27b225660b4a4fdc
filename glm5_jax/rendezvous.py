"""All processes of a program wait for each other, before JAX connects them.

JAX aborts a process that waited in vain, with a stack trace that says nothing of which processes
are missing. Here process 0 listens where JAX's coordinator is going to, the others say who they
are, and all of them learn who did not come, who came twice or who was told another number.
"""

import contextlib
import json
import socket
import time
from typing import Any, NamedTuple, TypeGuard

from glm5_jax.errors import InputError

_LONGEST_LINE = 4096
_PAUSE = 0.2  # seconds between attempts to connect


class Member(NamedTuple):
    """Which of how many processes this is, and where the first of them listens."""

    host: str
    port: int
    total: int
    number: int

    @property
    def address(self) -> str:
        """The coordinator as JAX takes it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"process {self.number} of {self.total}"


def meet(member: Member, seconds: int) -> None:
    """Returns in every process once all have come.

    Raises:
      InputError: they did not within that time, or do not belong together; in every process that
        did come.
    """
    deadline = time.monotonic() + seconds
    fault = _receive(member, deadline) if member.number == 0 else _join(member, deadline)
    if fault is not None:
        raise InputError(f"{member} waited at {member.address} up to {seconds} s: {fault}")


def _receive(member: Member, deadline: float) -> str | None:
    """Process 0: waits for the others and tells them what came of it."""
    hosts = {0: socket.gethostname()}
    fault = None
    with contextlib.ExitStack() as connections:
        others = []
        with _listen(member) as server:
            while fault is None and len(hosts) < member.total:
                server.settimeout(max(deadline - time.monotonic(), 0.001))
                try:
                    other = connections.enter_context(server.accept()[0])
                except TimeoutError:
                    fault = _missing(member, hosts)
                    break
                if _is_greeting(greeting := _read_line(other, 5)):
                    others.append(other)
                    fault = _enter(greeting, member, hosts)
        # By now nobody listens, so JAX's coordinator can, and nobody takes this for it.
        for other in others:
            _write_line(other, {"fault": fault})
        for other in others:
            _read_line(other, 1)  # whoever closes first keeps the port busy; that is for them
    return fault


def _listen(member: Member) -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            ("", member.port),
            family=socket.AF_INET6 if dual else socket.AF_INET,
            dualstack_ipv6=dual,
            backlog=member.total,
        )
    except OSError as error:
        raise InputError(
            f"{member} cannot listen on port {member.port}: {error.strerror}; expected a free "
            "port, and one process only with number 0"
        ) from None


def _enter(greeting: dict[str, Any], member: Member, hosts: dict[int, str]) -> str | None:
    """Notes who has come; what is wrong with them, if anything is."""
    index, count, host = greeting["process"], greeting["of"], greeting["host"]
    if count != member.total:
        return (
            f"process {index} on {host} is one of {count}, and process 0 on {hosts[0]} one of "
            f"{member.total}, expected the same number"
        )
    if index in hosts:
        return (
            f"there are two processes {index}, on {hosts[index]} and on {host}, expected every "
            f"number from 0 to {count - 1} once"
        )
    hosts[index] = host
    return None


def _missing(member: Member, hosts: dict[int, str]) -> str:
    missing = [str(index) for index in range(member.total) if index not in hosts]
    more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
    return f"did not come: process {', '.join(missing[:8])}{more}; expected all {member.total}"


def _join(member: Member, deadline: float) -> str | None:
    """Every other process: goes to process 0 and hears what came of it."""
    greeting = {"process": member.number, "of": member.total, "host": socket.gethostname()}
    reason = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((member.host, member.port), timeout=left) as connection:
                _write_line(connection, greeting)
                # Process 0 may have begun to wait later than this one, and says so if it gives up.
                answer = _read_line(connection, deadline - time.monotonic() + 1)
            if answer is not None and "fault" in answer:
                return None if answer["fault"] is None else str(answer["fault"])
            reason = "whoever listens there does not answer"
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(_PAUSE)
    return f"no coordinator ({reason}); expected process 0 to have been started there"


def _write_line(connection: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # it is gone, as the other side will find
        connection.sendall(json.dumps(message).encode() + b"\n")


def _read_line(connection: socket.socket, seconds: float) -> dict[str, Any] | None:
    """One message; None if the other side went away or says none."""
    connection.settimeout(max(seconds, 0.001))
    line = b""
    try:
        while not line.endswith(b"\n") and len(line) < _LONGEST_LINE:
            part = connection.recv(_LONGEST_LINE)
            if not part:
                return None
            line += part
        message = json.loads(line)
    except (OSError, ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


def _is_greeting(message: dict[str, Any] | None) -> TypeGuard[dict[str, Any]]:
    """Whether it is what every process but the first says."""
    kinds = {"process": int, "of": int, "host": str}
    if message is None or {name: type(value) for name, value in message.items()} != kinds:
        return False
    return bool(0 <= message["process"] < message["of"])
