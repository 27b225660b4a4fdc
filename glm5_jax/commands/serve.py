"""`glm5 serve`: an HTTP server with OpenAI's API."""

import argparse
import importlib
import os
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from glm5_jax.commands.arguments import add_model, integer, positive
from glm5_jax.commands.asking import add_engine, make_engine
from glm5_jax.console import add_command, notice
from glm5_jax.coordination import Relay
from glm5_jax.errors import InputError
from glm5_jax.processes import add_processes, is_first, one_program
from glm5_jax.server.limits import Limits

if TYPE_CHECKING:
    from glm5_jax.inference.engine import Engine
    from glm5_jax.inference.tokenizer import Tokenizer
    from glm5_jax.server.orders import Order
    from glm5_jax.server.service import Service

_KEY = "GLM5_API_KEY"
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


def add(commands: Any) -> None:
    """Adds the command."""
    command = add_command(
        commands,
        "serve",
        _run,
        "Serve a model over HTTP, with OpenAI's API and a page to chat.\n\n"
        "SIGTERM and SIGINT end it once the answers that have begun are complete, a second one\n"
        "at once.",
    )
    add_model(command)
    _add_network(command)
    add_engine(command)
    command.add_argument(
        "--warm-up",
        type=integer(0),
        default=1024,
        metavar="N",
        help="compile for texts of up to N tokens before serving; when the first longer one comes "
        "all wait for what it needs",
    )
    _add_limits(command)
    add_processes(command)


def _add_network(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen; 0.0.0.0: anywhere"
    )
    command.add_argument(
        "--port", type=integer(0, 65535), default=8000, metavar="N", help="0 takes one that is free"
    )
    command.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"what clients must show (default: that of {_KEY} in the environment; else none)",
    )
    command.add_argument(
        "--served-model-name",
        metavar="NAME",
        help="by which clients ask for the model (default: that of its directory)",
    )


def _add_limits(command: argparse.ArgumentParser) -> None:
    limits = command.add_argument_group("limits")
    for name, least, default, text in (
        ("--max-queue", 0, Limits.queue, "answers that wait for a slot"),
        ("--max-body-bytes", 1, Limits.body_bytes, "of a request"),
        ("--max-prompt-tokens", 1, Limits.prompt_tokens, "of a prompt (default: the context)"),
        ("--max-messages", 1, Limits.messages, "of a conversation"),
        ("--max-choices", 1, Limits.choices, "that a request's n may be"),
    ):
        limits.add_argument(name, type=integer(least), default=default, metavar="N", help=text)
    for name, seconds, text in (
        ("--request-timeout", Limits.seconds, "after which an incomplete answer is an error"),
        ("--drain-timeout", Limits.drain_seconds, "the same, after the signal to end"),
    ):
        limits.add_argument(name, type=positive, default=seconds, metavar="SECONDS", help=text)


def _run(args: argparse.Namespace) -> int:
    try:
        for name in ("prometheus_client", "uvicorn", "glm5_jax.server.app"):
            importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"glm5 serve needs {error.name}: pip install 'glm5-jax[serve]'") from None
    from glm5_jax.inference.tokenizer import Tokenizer
    from glm5_jax.load import read_model_config
    from glm5_jax.server.orders import Desk, follow
    from glm5_jax.server.run import listening_socket

    key = _key(args.api_key)
    read_model_config(args.model)  # says so first if there is no model at all
    tokenizer = Tokenizer(args.model)
    with one_program(args):
        try:
            tokenizer.render_chat([{"role": "user", "content": "hello"}])
        except InputError as error:  # models that were not taught to converse have no template
            notice(f"conversations may fail, completions do not: {error}")
        if is_first():
            with listening_socket(args.host, args.port) as bound:
                _serve(_service(args, tokenizer, key), bound)
        else:
            follow(Desk(_engine(args, tokenizer)), Relay().hear)
    return 0


def _engine(args: argparse.Namespace, tokenizer: "Tokenizer") -> "Engine":
    engine = make_engine(args, tokenizer.num_tokens)
    engine.warm_up(args.warm_up)
    return engine


def _serve(service: "Service", bound: socket.socket) -> None:
    from glm5_jax.server.run import Server

    host, port = bound.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def announce() -> None:
        print(f"serving {service.name} at {url}", flush=True)

    Server(service, announce).run([bound])


def _key(given: str | None) -> str | None:
    """The key of the argument or else of the environment."""
    key = os.environ.get(_KEY) if given is None else given
    # An empty one would let everybody in who believes to be kept out.
    if key is not None and not (key.isascii() and key.isprintable() and key.strip()):
        raise InputError(
            f"{_KEY if given is None else '--api-key'} is {key!r:.80}, expected visible characters"
        )
    return key


def _service(args: argparse.Namespace, tokenizer: "Tokenizer", key: str | None) -> "Service":
    from glm5_jax.inference.generation_config import stop_tokens, usual_sampling
    from glm5_jax.server.metrics import Metrics
    from glm5_jax.server.service import Service
    from glm5_jax.server.worker import Worker

    limits = Limits(
        queue=args.max_queue,
        body_bytes=args.max_body_bytes,
        prompt_tokens=args.max_prompt_tokens,
        messages=args.max_messages,
        choices=args.max_choices,
        seconds=args.request_timeout,
        drain_seconds=args.drain_timeout,
    )
    engine = _engine(args, tokenizer)
    metrics = Metrics(engine.statistics())
    return Service(
        worker=Worker(engine, limits.queue, metrics, _relay()),
        metrics=metrics,
        tokenizer=tokenizer,
        name=args.served_model_name or args.model.resolve().name,
        stop=stop_tokens(args.model, engine.config.eos_ids),
        defaults=usual_sampling(args.model),
        limits=limits,
        key=key,
        # Without a key, pages of others must not speak to a server that is for this machine only.
        hosts=_LOOPBACK if key is None and args.host in _LOOPBACK else None,
    )


def _relay() -> "Callable[[Sequence[Order] | None], None] | None":
    """Tells other processes, if there are any, what the engine is told."""
    import jax

    from glm5_jax.server.orders import to_text

    if not jax.distributed.is_initialized():
        return None
    relay = Relay()
    return lambda orders: relay.tell(to_text(orders))
