"""`glm5 generate`: continuations of prompts."""

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from glm5_jax.commands.arguments import add_model, checkpoint_identity, integer, require_same_input
from glm5_jax.commands.asking import (
    add_engine,
    add_sampling,
    check_engine,
    make_engine,
    sampling_of,
)
from glm5_jax.commands.prompts import read_prompts
from glm5_jax.commands.results import open_results
from glm5_jax.console import add_command, notice, progress
from glm5_jax.coordination import said_by_all
from glm5_jax.errors import InputError
from glm5_jax.inference.continuation import Continuation
from glm5_jax.inference.request import Request, Work, check_request
from glm5_jax.processes import add_processes, on_first, one_program

if TYPE_CHECKING:
    from glm5_jax.inference.engine import Engine
    from glm5_jax.inference.tokenizer import Tokenizer


def add(commands: Any) -> None:
    """Adds the command."""
    command = add_command(
        commands,
        "generate",
        _run,
        "Continue prompts.\n\n"
        "Tokenizer, chat template and stop tokens come from the model's directory; prompts of\n"
        "tokens need none of them.",
    )
    add_model(command)
    prompt = command.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue")
    prompt.add_argument(
        "--prompt-tokens", type=_token_list, metavar="5,7,11", help="token ids to continue"
    )
    prompt.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE.jsonl",
        help='one object per line, with "prompt", "prompt_tokens" or "messages"; other keys are '
        "ignored",
    )
    command.add_argument(
        "--max-new-tokens",
        type=integer(1),
        default=128,
        metavar="N",
        help="tokens to generate unless the text ends before",
    )
    command.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="a text that ends a continuation, and is not shown; may be given several times",
    )
    command.add_argument(
        "--out",
        type=Path,
        metavar="FILE.jsonl",
        help="write what --json prints there, as it comes; a run that ended early is continued",
    )
    command.add_argument(
        "--json",
        action="store_true",
        help="print a JSON object per prompt: index, prompt_tokens, tokens, text, finish_reason, "
        "and the work that it took",
    )
    add_sampling(command)
    add_engine(command)
    add_processes(command)


def _token_list(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text.strip() else []
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"is {text!r:.80}, expected token ids separated by commas"
        ) from None


def _run(args: argparse.Namespace) -> int:
    with one_program(args):
        _generate(args)
    return 0


def _generate(args: argparse.Namespace) -> None:
    asked = read_prompts(args)

    from glm5_jax.inference.generation_config import stop_tokens
    from glm5_jax.load import read_model_config

    config = read_model_config(args.model).config
    check_engine(args, config)
    is_text = any(each.kind != "prompt_tokens" for each in asked) or bool(args.stop)
    tokenizer = _tokenizer(args.model, needed=is_text)
    sampling, stop = sampling_of(args), stop_tokens(args.model, config.eos_ids)
    requests = [
        Request(
            prompt=tuple(each.encode(tokenizer)),
            max_new_tokens=args.max_new_tokens,
            sampling=sampling,
            number=number,
            stop=stop,
        )
        for number, each in enumerate(asked)
    ]
    context = args.context or config.max_positions
    for request, each in zip(requests, asked, strict=True):
        check_request(request, config.vocab_size, context, each.where)
    num_tokens = tokenizer.num_tokens if tokenizer else None
    values = {
        "config": config,
        "checkpoint": checkpoint_identity(args.model),
        "requests": requests,
        "vocabulary": num_tokens,
    }
    require_same_input(args, **values)
    longest = max(len(request.prompt) for request in requests) + args.max_new_tokens

    def finish(left: Sequence[Request]) -> Iterator[_Result]:
        engine = make_engine(args, num_tokens, longest)
        return _finish(engine, left, tokenizer, args.stop)

    if args.out is not None:
        run = hashlib.sha256(repr((values, args.stop, args.dtype)).encode()).hexdigest()[:12]
        _append(args, requests, run, finish)
    elif len(requests) == 1 and tokenizer and not args.json:
        engine = make_engine(args, num_tokens, longest)
        _stream(engine, requests[0], tokenizer, args.stop)
    else:
        for result in _in_order(finish(requests)):
            _print(result, as_json=args.json, numbered=len(requests) > 1)


def _append(
    args: argparse.Namespace,
    requests: Sequence[Request],
    run: str,
    finish: Callable[[Sequence[Request]], Iterator["_Result"]],
) -> None:
    """Adds the results that are missing to the file of the arguments."""
    with on_first(lambda: open_results(args.out, run, len(requests))) as results:
        known = json.dumps(sorted(results.done) if results else [])
        done = json.loads(said_by_all("results", known, int(args.start_timeout))[0])
        left = [request for request in requests if request.number not in done]
        tokens = 0
        for result in finish(left) if left else ():
            tokens += len(result.tokens)
            if results is not None:
                results.add(result.request.number, result.record() | {"run": run})
    print(f"{args.out}: {len(left)} prompts, {len(done)} before, {tokens} new tokens")


def _print(result: "_Result", *, as_json: bool, numbered: bool) -> None:
    if as_json:
        print(json.dumps({"index": result.request.number, **result.record()}))
        return
    if numbered:
        print(f"--- prompt {result.request.number + 1}")
    print(",".join(map(str, result.tokens)) if result.text is None else result.text)


class _Result(NamedTuple):
    """What became of a request."""

    request: Request
    tokens: list[int]
    text: str | None  # None without a tokenizer
    finish_reason: str
    work: Work | None

    def record(self) -> dict[str, Any]:
        """The same as it is written in JSON."""
        return {
            "prompt_tokens": list(self.request.prompt),
            "tokens": self.tokens,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "work": self.work and self.work._asdict(),
        }


def _finish(
    engine: "Engine",
    requests: Sequence[Request],
    tokenizer: "Tokenizer | None",
    stop: Sequence[str],
) -> Iterator[_Result]:
    """Continues all requests, with a progress bar; gives each when it is complete."""
    from rich.progress import TextColumn

    decode = tokenizer.decode if tokenizer else _no_text
    asked = {engine.submit(request): request for request in requests}
    tokens: dict[int, list[int]] = {number: [] for number in asked}
    texts = {number: Continuation(decode, stop) for number in asked}
    parts: dict[int, str] = dict.fromkeys(asked, "")
    begun, total = time.monotonic(), 0
    rate = TextColumn("{task.completed}/{task.total} prompts, {task.fields[rate]:.0f} tokens/s")
    with progress("generate", len(asked), rate, rate=0.0) as advance:
        while not engine.is_idle:
            events = engine.step()
            for event in events:
                number, total = event.request, total + 1
                if number not in asked:  # its text ended, at a stop string
                    continue
                part = texts[number].push(event)
                tokens[number].append(event.token)
                parts[number] += part.text
                if part.finish_reason is None:
                    continue
                took = (each.work for each in events if each.request == number and each.work)
                work = next(took, None) or engine.cancel(number)
                text = parts[number] if tokenizer else None
                yield _Result(asked.pop(number), tokens[number], text, part.finish_reason, work)
                advance(1, rate=total / (time.monotonic() - begun))


def _in_order(results: Iterator[_Result]) -> Iterator[_Result]:
    """Results in the order of their requests, each as soon as all before it are there."""
    early: dict[int, _Result] = {}
    following = 0
    for result in results:
        early[result.request.number] = result
        while following in early:
            yield early.pop(following)
            following += 1


def _no_text(tokens: Sequence[int]) -> str:
    return ""


def _tokenizer(directory: Path, *, needed: bool) -> "Tokenizer | None":
    """The model's tokenizer; prompts of tokens do without if there is none that can be used."""
    from glm5_jax.inference.tokenizer import TOKENIZER_NAME, Tokenizer

    if not needed and not (directory / TOKENIZER_NAME).is_file():
        return None
    try:
        return Tokenizer(directory)
    except InputError as error:
        if needed:
            raise
        notice(f"tokens are not shown as text: {error}")
        return None


def _stream(
    engine: "Engine", request: Request, tokenizer: "Tokenizer", stop: Sequence[str]
) -> None:
    """Prints the text of one prompt's continuation as it comes."""
    continuation = Continuation(tokenizer.decode, stop)
    number = engine.submit(request)
    while not engine.is_idle:
        for event in engine.step():
            part = continuation.push(event)
            print(part.text, end="", flush=True)
            if part.finish_reason is not None:
                engine.cancel(number)
                break
    print()
