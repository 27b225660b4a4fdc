"""The prompts that a command is given, and their tokens."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from glm5_jax.errors import InputError
from glm5_jax.strict_json import parse_json

if TYPE_CHECKING:
    from glm5_jax.inference.tokenizer import Tokenizer


class Prompt(NamedTuple):
    """What to continue, as it was given."""

    kind: str  # prompt, prompt_tokens or messages
    value: Any
    where: str  # it was given, as errors call it

    def encode(self, tokenizer: "Tokenizer | None") -> list[int]:
        """Its tokens; raises `InputError` if it is nothing to be continued."""
        if self.kind == "prompt_tokens":
            tokens: list[int] = self.value
            return tokens
        assert tokenizer is not None
        try:
            if self.kind == "messages":
                return tokenizer.encode_chat(self.value)
            return tokenizer.encode(self.value)
        except InputError as error:
            raise InputError(f"{self.where}: {error}") from None


def read_prompts(args: argparse.Namespace) -> list[Prompt]:
    """The prompts of the arguments `--prompt`, `--prompt-tokens` and `--prompts`.

    Raises:
      InputError: the file has anything but objects with one kind of prompt each.
    """
    if args.prompt is not None:
        return [Prompt("prompt", args.prompt, "--prompt")]
    if args.prompt_tokens is not None:
        return [Prompt("prompt_tokens", args.prompt_tokens, "--prompt-tokens")]
    try:
        text = args.prompts.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{args.prompts}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{args.prompts}: not UTF-8: {error}") from None
    prompts = []
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
        prompts.append(Prompt(kinds[0], request[kinds[0]], where))
    if not prompts:
        raise InputError(f"{args.prompts}: is empty, expected one object per line")
    return prompts


_KINDS: dict[str, Callable[[Any], bool]] = {
    "prompt": lambda value: isinstance(value, str),
    "prompt_tokens": lambda value: (
        isinstance(value, list) and all(type(token) is int for token in value)
    ),
    "messages": lambda value: (
        isinstance(value, list) and all(isinstance(message, dict) for message in value)
    ),
}
