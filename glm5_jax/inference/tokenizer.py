"""Text to tokens and back, and conversations to prompts, with the files of a model directory."""

import datetime
import functools
import json
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from types import MappingProxyType
from typing import Any

from glm5_jax.errors import InputError
from glm5_jax.strict_json import parse_json, read_json

TOKENIZER_NAME = "tokenizer.json"
# Tokens that end a text or a turn, also where a tokenizer does not call them special.
_ENDS = frozenset({"<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"})


class Tokenizer:
    """The tokenizer and the chat template of a model directory."""

    def __init__(self, directory: Path):
        """Loads `tokenizer.json` and, where there is one, the chat template.

        Raises:
          InputError: there is no tokenizer, it is damaged, or `tokenizers` is not installed.
        """
        try:
            import tokenizers
        except ImportError:
            raise InputError(
                "text needs the package tokenizers: pip install 'glm5-jax[serve]'"
            ) from None
        path = directory / TOKENIZER_NAME
        if not path.is_file():
            raise InputError(f"{directory}: has no {TOKENIZER_NAME}, which text needs")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust library raises Exception itself
            raise InputError(f"{path}: not a tokenizer: {error!s:.200}") from None
        # A file keeps how a trainer cut and filled up its batches; texts are as long as they are.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._directory = directory
        self._has_bytes = isinstance(self._tokenizer.decoder, tokenizers.decoders.ByteLevel)
        self._special = {
            number: token.content
            for number, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special or token.content in _ENDS
        }

    @property
    def num_tokens(self) -> int:
        """Ids from here on are rows that pad the model's vocabulary."""
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        return max(ids, default=-1) + 1

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The tokens of a text, with those that the tokenizer puts around it unless not wanted.

        Raises:
          InputError: the text is not Unicode, as what a terminal in another encoding sends.
        """
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise InputError(f"text {text!r:.80} is not valid Unicode")
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def encode_batch(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """The tokens of several texts, which all processors encode, with no special ones in them.

        What looks like one in a text is text.
        """
        self._tokenizer.encode_special_tokens = True
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        self._tokenizer.encode_special_tokens = False
        return (each.ids for each in encoded)

    def end_id(self) -> int:
        """The token that ends a text.

        Raises:
          InputError: `tokenizer_config.json` does not name one that the tokenizer has.
        """
        path = self._directory / "tokenizer_config.json"
        token = read_json(path).get("eos_token")
        text = token.get("content") if isinstance(token, dict) else token
        found = self._tokenizer.token_to_id(text) if isinstance(text, str) else None
        if found is None:
            raise InputError(
                f"{path}: eos_token is {token!r:.80}, expected one of {TOKENIZER_NAME}"
            )
        return int(found)

    def decode(self, tokens: Sequence[int], keep: Set[str] = frozenset()) -> str:
        """The text of tokens, without special ones but for those whose text is to be kept."""
        special = self._special
        shown = [t for t in tokens if t not in special or special[t] in keep]
        return str(self._tokenizer.decode(shown, skip_special_tokens=False))

    def token_text(self, token: int) -> tuple[str, list[int]]:
        """The text of one token, be it special, and its bytes; both empty for ids without text.

        A token may be a part of a character: the bytes of several make it up, their texts do not.
        """
        name = self._tokenizer.id_to_token(token)
        if name is None:
            return "", []
        table = _bytes_of_characters()
        if self._has_bytes and all(character in table for character in name):
            content = bytes(table[character] for character in name)
            return content.decode(errors="replace"), list(content)
        text = str(self._tokenizer.decode([token], skip_special_tokens=False))
        return text, list(text.encode())

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[int]:
        """The tokens of what `render_chat` gives; raises `InputError` as it does."""
        return self.encode(self.render_chat(messages, tools=tools, options=options), special=False)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """The prompt of a conversation, up to where the assistant's turn begins.

        Args:
          messages: as OpenAI's API has them, with text only.
          tools: those that the assistant may call.
          options: more names for the template, such as `enable_thinking`.

        Raises:
          InputError: there is no chat template, it refuses the messages, or they are malformed.
        """
        given = {
            "messages": [_message(m, f"messages[{n}]") for n, m in enumerate(messages)],
            "tools": tools,
            "add_generation_prompt": True,
        }
        for name in sorted(given.keys() & options):
            raise InputError(f"option {name} of the chat template is not free to choose")
        template, special = self._template, self._special_tokens()
        try:
            return template.render({**special, **options, **given})
        except Exception as error:  # the program may do anything that ends in one
            raise _failed(error) from None

    @functools.cached_property
    def _template(self) -> Any:
        try:
            import jinja2
            import jinja2.sandbox
        except ImportError:
            raise InputError(
                "conversations need the package jinja2: pip install 'glm5-jax[serve]'"
            ) from None

        def refuse(message: str) -> str:
            raise jinja2.TemplateError(message)

        def to_json(value: Any, **options: Any) -> str:
            return json.dumps(value, **{"ensure_ascii": False, **options})

        # Sandboxed: a template is a program that came with the weights.
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = to_json
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda text: datetime.datetime.now().strftime(text)
        source = self._template_source()
        try:
            return environment.from_string(source)
        except Exception as error:  # the parser may fail in any way on what is no template
            raise _failed(error) from None

    def _special_tokens(self) -> dict[str, str]:
        """The texts of `eos_token` and its like, which templates may name."""
        path = self._directory / "tokenizer_config.json"
        config = read_json(path) if path.is_file() else {}
        named = {key: value for key, value in config.items() if key.endswith("_token")}
        texts = {
            key: value.get("content") if isinstance(value, dict) else value
            for key, value in named.items()
        }
        return {key: text for key, text in texts.items() if isinstance(text, str)}

    def _template_source(self) -> str:
        path = self._directory / "chat_template.jinja"
        if path.is_file():
            try:
                return path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{path.name}: not UTF-8: {error}") from None
        config = self._directory / "tokenizer_config.json"
        template = read_json(config).get("chat_template") if config.is_file() else None
        if not isinstance(template, str):
            raise InputError("the model has no chat_template.jinja, which messages need")
        return template


def _failed(error: Exception) -> InputError:
    return InputError(f"the chat template failed: {error}")


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A message as templates expect it: content is a text, arguments of calls are objects."""
    if not isinstance(message, Mapping):
        raise InputError(f"{where} is {message!r:.80}, expected an object")
    content, calls = message.get("content"), message.get("tool_calls")
    says_other = message.get("role") == "assistant" and (calls or message.get("reasoning_content"))
    if content is None and says_other:
        content = ""
    result = {**message, "content": _content(content, f"{where}.content")}
    if message.get("role") == "developer":  # OpenAI's newer name for what templates call system
        result["role"] = "system"
    if calls is not None:
        if not isinstance(calls, list):
            raise InputError(f"{where}.tool_calls is {calls!r:.80}, expected a list")
        result["tool_calls"] = [_call(c, f"{where}.tool_calls[{n}]") for n, c in enumerate(calls)]
    return result


def _content(content: object, where: str) -> str:
    if isinstance(content, list):
        return "".join(_part(part, f"{where}[{n}]") for n, part in enumerate(content))
    if not isinstance(content, str):
        raise InputError(f"{where} is {content!r:.80}, expected a text or a list of text parts")
    return content


def _part(part: object, where: str) -> str:
    if not isinstance(part, Mapping):
        raise InputError(f"{where} is {part!r:.80}, expected an object with a type")
    kind, text = part.get("type"), part.get("text")
    if kind != "text":
        raise InputError(f"{where}.type is {kind!r:.80}, expected 'text'")
    if not isinstance(text, str):
        raise InputError(f"{where}.text is {text!r:.80}, expected a text")
    return text


def _call(call: object, where: str) -> dict[str, Any]:
    """A tool call whose arguments are an object, which OpenAI's API has as JSON in a text."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise InputError(f"{where} is {call!r:.80}, expected an object with a function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = parse_json(arguments, f"{where}.function.arguments")
    if not isinstance(arguments, Mapping):
        raise InputError(
            f"{where}.function.arguments is {arguments!r:.80}, expected a JSON object in a text"
        )
    return {**call, "function": {**function, "arguments": arguments}}


@functools.cache
def _bytes_of_characters() -> dict[str, int]:
    """The alphabet of byte-level BPE: bytes that are no visible Latin-1 are shifted above it."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in visible]
    shifted = {chr(0x100 + number): byte for number, byte in enumerate(others)}
    return {chr(byte): byte for byte in visible} | shifted
