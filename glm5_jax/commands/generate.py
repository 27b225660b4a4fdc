"""`glm5 generate`: continuations of prompts."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm5_jax.commands.arguments import (
    LARGEST_SEED,
    add_model,
    integer,
    load,
    non_negative,
    require_same_input,
)
from glm5_jax.console import add_command, notice, progress
from glm5_jax.errors import InputError
from glm5_jax.processes import add_processes, one_program
from glm5_jax.strict_json import parse_json

if TYPE_CHECKING:
    from glm5_jax.inference.generate import Generator
    from glm5_jax.inference.sampling import Sampling
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
        help='one object per line, with "prompt", "prompt_tokens" or "messages"',
    )
    command.add_argument(
        "--max-new-tokens",
        type=integer(1),
        required=True,
        metavar="N",
        help="tokens to generate unless a stop token comes before",
    )
    command.add_argument(
        "--temperature",
        type=non_negative,
        default=0.0,
        metavar="X",
        help="0 takes the likeliest token",
    )
    command.add_argument(
        "--seed",
        type=integer(0, LARGEST_SEED),
        default=0,
        metavar="S",
        help="of tokens drawn at a temperature",
    )
    command.add_argument(
        "--context",
        type=integer(1),
        metavar="N",
        help="most tokens of a prompt and its continuation (default: all the model can take)",
    )
    command.add_argument(
        "--batch-size", type=integer(1), default=8, metavar="N", help="prompts continued together"
    )
    command.add_argument(
        "--json",
        action="store_true",
        help="print a JSON object per prompt: prompt_tokens, tokens, text, finish_reason",
    )
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
    requests = _requests(args)

    from glm5_jax.inference.generate import Generator, check_prompt
    from glm5_jax.inference.sampling import Sampling
    from glm5_jax.inference.tokenizer import stop_tokens
    from glm5_jax.load import read_model_config

    config = read_model_config(args.model).config
    if args.context is not None and args.context > config.max_positions:
        raise InputError(
            f"--context is {args.context}, expected at most the model's {config.max_positions}"
        )
    tokenizer = _tokenizer(args.model, needed=any("prompt_tokens" not in r for r in requests))
    prompts = [_prompt(request, tokenizer) for request in requests]
    for number, prompt in enumerate(prompts, start=1):
        check_prompt(prompt, args.max_new_tokens, config, args.context, f"prompt {number}")
    stop = stop_tokens(args.model, config.eos_ids)
    num_tokens = tokenizer.num_tokens if tokenizer else None
    require_same_input(
        args, config=config, prompts=prompts, stop_tokens=sorted(stop), vocabulary=num_tokens
    )
    model, partition = load(args)
    generator = Generator(model, partition, stop=stop, num_tokens=num_tokens, context=args.context)
    sampling = Sampling(temperature=args.temperature, seed=args.seed)
    if len(prompts) == 1 and tokenizer and not args.json:
        _stream(generator, prompts[0], args.max_new_tokens, sampling, tokenizer)
        return
    with progress("generate", len(prompts)) as advance:
        for first in range(0, len(prompts), args.batch_size):
            batch = prompts[first : first + args.batch_size]
            completions = generator.complete(batch, args.max_new_tokens, sampling, first)
            pairs = zip(batch, completions, strict=True)
            for number, (prompt, completion) in enumerate(pairs, start=first + 1):
                text = tokenizer.decode(completion.tokens) if tokenizer else None
                if args.json:
                    fields = {"prompt_tokens": prompt, "tokens": completion.tokens, "text": text}
                    print(json.dumps(fields | {"finish_reason": completion.finish_reason}))
                else:
                    if len(prompts) > 1:
                        print(f"--- prompt {number}")
                    print(",".join(map(str, completion.tokens)) if text is None else text)
                advance(1)


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


def _requests(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What to continue: objects with one of `prompt`, `prompt_tokens` and `messages`."""
    if args.prompt is not None:
        return [{"prompt": args.prompt}]
    if args.prompt_tokens is not None:
        return [{"prompt_tokens": args.prompt_tokens}]
    try:
        text = args.prompts.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{args.prompts}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{args.prompts}: not UTF-8: {error}") from None
    requests = []
    # Not splitlines: a JSON string may hold characters that Unicode counts as ends of lines.
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], start=1):
        where = f"{args.prompts}, line {number}"
        request = parse_json(line, where)
        kinds = [kind for kind in _KINDS if kind in request]
        if len(kinds) != 1 or not _KINDS[kinds[0]](request[kinds[0]]):
            raise InputError(
                f'{where}: expected one of "prompt" with a text, "prompt_tokens" with a list of '
                'token ids and "messages" with a list of objects'
            )
        requests.append(request)
    if not requests:
        raise InputError(f"{args.prompts}: is empty, expected one object per line")
    return requests


_KINDS: dict[str, Callable[[Any], bool]] = {
    "prompt": lambda value: isinstance(value, str),
    "prompt_tokens": lambda value: (
        isinstance(value, list) and all(type(token) is int for token in value)
    ),
    "messages": lambda value: (
        isinstance(value, list) and all(isinstance(message, dict) for message in value)
    ),
}


def _prompt(request: dict[str, Any], tokenizer: "Tokenizer | None") -> list[int]:
    if "prompt_tokens" in request:
        tokens: list[int] = request["prompt_tokens"]
        return tokens
    assert tokenizer is not None
    if "messages" in request:
        return tokenizer.encode_chat(request["messages"])
    return tokenizer.encode(request["prompt"])


def _stream(
    generator: "Generator",
    prompt: list[int],
    max_new_tokens: int,
    sampling: "Sampling",
    tokenizer: "Tokenizer",
) -> None:
    """Prints the text of one prompt's continuation as it comes."""
    tokens: list[int] = []
    printed = ""
    for event in generator.generate([prompt], max_new_tokens, sampling):
        tokens.append(event.token)
        text = tokenizer.decode(tokens)
        # A character may take several tokens; until it is whole its text ends in U+FFFD.
        if event.finish_reason or not text.endswith("\ufffd"):
            print(text[len(printed) :], end="", flush=True)
            printed = text
    print()
