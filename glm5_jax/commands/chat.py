"""`glm5 chat`: a conversation in the terminal."""

import argparse
import contextlib
import dataclasses
import functools
import secrets
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from glm5_jax.commands.arguments import add_model, integer
from glm5_jax.commands.asking import add_engine, add_sampling, make_engine, sampling_of
from glm5_jax.console import add_command, notice
from glm5_jax.errors import InputError
from glm5_jax.inference.request import LARGEST_SEED, Request, Sampling

if TYPE_CHECKING:
    from glm5_jax.inference.engine import Engine
    from glm5_jax.inference.reply import Piece
    from glm5_jax.inference.tokenizer import Tokenizer

_HELP = "/new begins anew, /exit or end of input leaves, Ctrl-C stops an answer"
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


def add(commands: Any) -> None:
    """Adds the command."""
    command = add_command(
        commands,
        "chat",
        _run,
        f"Talk with a model in the terminal.\n\nIn the conversation {_HELP}.",
    )
    add_model(command)
    command.add_argument("--system", metavar="TEXT", help="a message of the system before all")
    command.add_argument(
        "--no-thinking", action="store_true", help="ask the template for answers without reasoning"
    )
    command.add_argument(
        "--max-new-tokens", type=integer(1), metavar="N", help="of an answer (default: as many fit)"
    )
    add_sampling(command, temperature=None)
    add_engine(command, slots=1)


def _run(args: argparse.Namespace) -> int:
    from glm5_jax.inference.generation_config import stop_tokens, usual_sampling
    from glm5_jax.inference.tokenizer import Tokenizer
    from glm5_jax.load import read_model_config

    read_model_config(args.model)  # says so first if there is no model at all
    tokenizer = Tokenizer(args.model)
    sampling = sampling_of(args, usual_sampling(args.model))
    if args.seed is None:
        sampling = dataclasses.replace(sampling, seed=secrets.randbelow(LARGEST_SEED + 1))
    tokenizer.render_chat([{"role": "user", "content": ""}])  # fails early without a template
    engine = make_engine(args, tokenizer.num_tokens)
    stop = stop_tokens(args.model, engine.config.eos_ids)
    conversation = _Conversation(engine, tokenizer, sampling, stop, args)
    notice(f"{_HELP}.")
    for line in _lines():
        if line in ("/exit", "/quit"):
            break
        if line == "/new":
            conversation.begin()
        elif line.startswith("/"):
            notice(_HELP)
        elif line.strip():
            try:
                _show(conversation.answer(line))
            except InputError as error:  # too long, say; the conversation goes on without it
                notice(str(error))
    return 0


class _Conversation:
    """Messages so far, and the engine that continues them: it still knows what it has read."""

    def __init__(
        self,
        engine: "Engine",
        tokenizer: "Tokenizer",
        sampling: Sampling,
        stop: frozenset[int],
        args: argparse.Namespace,
    ):
        self._engine, self._tokenizer = engine, tokenizer
        self._sampling, self._stop = sampling, stop
        self._longest, self._system = args.max_new_tokens, args.system
        self._options = {"enable_thinking": False} if args.no_thinking else {}
        self._answers = 0
        self.begin()

    def begin(self) -> None:
        """Forgets all but the message of the system."""
        self._messages: list[dict[str, Any]] = []
        if self._system is not None:
            self._messages.append({"role": "system", "content": self._system})

    def answer(self, text: str) -> Iterator["Piece"]:
        """Says something; gives the answer as it comes. Both are remembered.

        Raises:
          InputError: it does not fit the context any more.
        """
        from glm5_jax.inference.continuation import Continuation
        from glm5_jax.inference.reply import TAGS, Content, ReplyParser, starts_thinking

        messages = [*self._messages, {"role": "user", "content": text}]
        rendered = self._tokenizer.render_chat(messages, options=self._options)
        prompt = self._tokenizer.encode(rendered, special=False)
        room = self._engine.context - len(prompt)
        request = Request(
            prompt=tuple(prompt),
            max_new_tokens=max(1, min(room, self._longest or room)),
            sampling=self._sampling,
            number=self._answers,
            stop=self._stop,
        )
        number = self._engine.submit(request)
        self._answers += 1
        continuation = Continuation(functools.partial(self._tokenizer.decode, keep=TAGS), ())
        parser, pieces = ReplyParser(starts_thinking(rendered)), []
        with _stopping() as is_stopped:
            while not self._engine.is_idle and not is_stopped():
                for event in self._engine.step():
                    new = parser.push(continuation.push(event).text)
                    pieces += new
                    yield from new
        self._engine.cancel(number)
        last = parser.finish()
        yield from last
        said = [piece for piece in (*pieces, *last) if isinstance(piece, Content)]
        content = "".join(piece.text for piece in said)
        self._messages = [*messages, {"role": "assistant", "content": content}]


@contextlib.contextmanager
def _stopping() -> Iterator[Any]:
    """Lets Ctrl-C stop an answer and not the command; gives a function that says whether it did."""
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def _lines() -> Iterator[str]:
    """What the user enters, line by line."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  lets `input` edit and recall lines
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(prompt)
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise InputError(f"the input is not UTF-8: {error}") from None


def _show(pieces: Iterator["Piece"]) -> None:
    """Prints an answer as it comes; reasoning dimmed where the terminal can."""
    from glm5_jax.inference.reply import Content, Reasoning

    dim, plain = (_DIM, _PLAIN) if sys.stdout.isatty() else ("", "")
    before = None
    for piece in pieces:
        if not isinstance(piece, Reasoning | Content):
            continue
        if before is not None and type(piece) is not before:
            print(f"{plain}\n")
        before = type(piece)
        print(f"{dim if before is Reasoning else ''}{piece.text}{plain}", end="", flush=True)
    print(flush=True)
