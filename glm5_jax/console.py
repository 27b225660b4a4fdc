"""What the three commands share: one-line errors, exit statuses and progress bars."""

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, Protocol

from glm5_jax.atomic import remove_unfinished
from glm5_jax.compiled import keep_compiled_programs
from glm5_jax.errors import InputError


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit with status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of a description, and shows defaults that are set."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        shows_nothing = default is None or default is False or default == argparse.SUPPRESS
        if shows_nothing or default == []:
            return action.help
        return super()._get_help_string(action)


def command_parser(prog: str, description: str) -> tuple[Parser, Any]:
    """A parser for a command with subcommands, and what `add_command` adds them to."""
    parser = Parser(prog=prog, description=description, formatter_class=_Help)
    return parser, parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=Parser
    )


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], description: str
) -> Parser:
    """Adds a subcommand; the first line of the description stands in the list of commands."""
    parser: Parser = commands.add_parser(
        name,
        help=description.partition("\n")[0],
        description=description,
        formatter_class=_Help,
    )
    parser.set_defaults(run=run)
    return parser


def run_command(parser: Parser, arguments: Sequence[str] | None) -> int:
    """Parses arguments and runs the chosen command; returns its exit status.

    Whatever the user or the machine got wrong is one line on standard error and status 2. Defects
    of the program keep their traceback.
    """
    args = parser.parse_args(arguments)
    keep_compiled_programs()

    def run() -> int:
        with _ended_by_signals(parser.prog):
            status: int = args.run(args)
            sys.stdout.flush()
        return status

    return exit_status(parser.prog, run)


def exit_status(prog: str, run: Callable[[], int]) -> int:
    """What `run` returns; of errors that are not its defects, said in one line, 2."""
    try:
        return run()
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (InputError, OSError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{error.filename}: {error.strerror}"
        print(f"{prog}: error: {_on_one_line(text)}", file=sys.stderr)
        return 2
    except Exception as error:
        if (why := _out_of_memory(error)) is None:
            raise
        print(f"{prog}: error: {why}", file=sys.stderr)
        return 2


def _on_one_line(text: str) -> str:
    """A text, which may quote files, without what would break the line or move the cursor."""
    line = " ".join(text.split())
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in line)


def _out_of_memory(error: BaseException) -> str | None:
    """What to say of an error if it is that of a machine or a device whose memory did not do.

    The latter by name, as JAX is not loaded for it.
    """
    if isinstance(error, MemoryError):
        return _on_one_line(f"not enough memory: {error}") if str(error) else "not enough memory"
    if type(error).__name__ != "JaxRuntimeError" or "RESOURCE_EXHAUSTED" not in str(error):
        return None
    why = str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ").rstrip(".")
    return f"{why:.200}; expected a model, batch and length that the devices have memory for"


@contextlib.contextmanager
def _ended_by_signals(prog: str) -> Iterator[None]:
    """Ends the process at once when it is told to, with nothing half-written left.

    An exception would do in Python code, but not while extensions are imported, which swallow it,
    or while XLA compiles, whose threads crash an interpreter that shuts down.
    """

    def end(number: int, frame: object) -> NoReturn:
        remove_unfinished()
        with contextlib.suppress(Exception):
            show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # bars hide it
            word = "interrupted" if number == signal.SIGINT else "terminated"
            print(f"{show_cursor}{prog}: {word}", file=sys.stderr, flush=True)
            sys.stdout.flush()
        os._exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_silent = False  # of all threads: this process shows neither notices nor bars


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Holds back notices and progress bars, which another process shows; errors are shown."""
    global _silent
    before, _silent = _silent, True
    try:
        yield
    finally:
        _silent = before


def notice(message: str) -> None:
    """Tells the user something on standard error; if nobody reads that, work goes on."""
    if not _silent:
        with contextlib.suppress(OSError):
            print(message, file=sys.stderr)


class Advance(Protocol):
    """Moves a progress bar."""

    def __call__(self, amount: int, **fields: Any) -> None: ...


@contextlib.contextmanager
def progress(description: str, total: int, *columns: Any, **fields: Any) -> Iterator[Advance]:
    """Shows a progress bar with the time left, on standard error, if that is a terminal.

    Args:
      total: in the unit that the bar is moved by.
      columns: rich columns to put between the bar and the time.
      fields: what the columns see at first; `advance` updates them.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *columns,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=_silent or not console.is_terminal,
    )
    with bar:
        task = bar.add_task(description, total=total, **fields)

        def advance(amount: int, **changed: Any) -> None:
            bar.update(task, advance=amount, **changed)

        yield advance
