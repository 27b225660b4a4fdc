"""The prompts that a command is given, and their tokens."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from glm5_jax.errors import InputError
from glm5_jax.strict_json import parse_json

if TYPE_CHECKING:
    from glm5_jax.inference.tokenizer import Tokenizer


def read_prompts(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What to continue: objects with one of `prompt`, `prompt_tokens` and `messages`.

    Raises:
      InputError: the file has anything else.
    """
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


def encode_prompt(request: dict[str, Any], tokenizer: "Tokenizer | None") -> list[int]:
    """The tokens of one of them; raises `InputError` if it is nothing to be continued."""
    if "prompt_tokens" in request:
        tokens: list[int] = request["prompt_tokens"]
        return tokens
    assert tokenizer is not None
    if "messages" in request:
        return tokenizer.encode_chat(request["messages"])
    return tokenizer.encode(request["prompt"])
