"""Conversions that are begun, ended and looked at."""

import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path

from convert import quantize, to_native, to_published
from convert.__main__ import main

# What is made, and what does one of the shards that a record is kept of.
STEPS = {
    "from-hf": (to_native._Conversion, "_convert"),
    "to-hf": (to_published._Conversion, "_write"),
    "quantize": (quantize._Quantization, "_round"),
}
DIRECTIONS = list(STEPS)
PUBLISHED = ["--shard-size", "200KB"]


def command(direction, source, native, destination, *options):
    if direction == "from-hf":
        return ["from-hf", str(source), str(destination), *options]
    if direction == "to-hf":
        return ["to-hf", str(native), str(destination), *PUBLISHED, *options]
    return ["quantize", str(native), str(destination), "--to", "int4", *options]


def contents(directory):
    """Every file's bytes but Orbax's, which have a time in them."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name not in ("_CHECKPOINT_METADATA", "commit_success.txt")
    }


def params(directory):
    """All but the record, which names what was read."""
    said = ("conversion.json", "CONVERSION.md")
    return {name: data for name, data in contents(directory).items() if name not in said}


def workspace(destination):
    return destination.with_name(f".{destination.name}.converting")


def forked():
    """Makes processes that have imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def convert(arguments, started=None, log=os.devnull, limit=None):
    """The command in a process of its own, which says what it says into a file.

    Args:
      limit: of bytes in a file; the system refuses to write more.
    """
    with Path(log).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if started is not None:
        started.set()
    sys.exit(main(arguments))


def convert_in_three(processes, arguments, log):
    """Three processes at once, each with its share; what each said."""
    logs = [log.with_name(f"{log.name}-{number}") for number in range(3)]
    running = []
    for number, own in enumerate(logs):
        share = [*arguments, "--process", f"{number}/3"]
        running.append(processes.Process(target=convert, args=(share, None, own)))
    for process in running:
        process.start()
    for process in running:
        process.join()
        assert process.exitcode == 0
    return [own.read_text() for own in logs]


def fail_after(monkeypatch, direction, count):
    """Has a full disk after so many shards."""
    conversion, step = STEPS[direction]
    original = getattr(conversion, step)
    calls = []

    def limited(*args):
        calls.append(1)
        if len(calls) > count:
            raise OSError(28, "No space left on device")
        return original(*args)

    monkeypatch.setattr(conversion, step, limited)


def begin(direction, source, native, destination, monkeypatch, *options):
    with monkeypatch.context() as patched:
        fail_after(patched, direction, 2)
        assert main(command(direction, source, native, destination, *options)) == 2
