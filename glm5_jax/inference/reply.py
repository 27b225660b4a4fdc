"""GLM's answers taken apart while they come: reasoning, content, tool calls.

An answer is `reasoning</think>content`, then any number of calls
`<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value>...</tool_call>`, with whitespace
between the parts or without. Values that are strings stand there as they are, others as JSON.

What is not in this format is content, and nothing is lost: a call that is malformed, that was cut
off, or whose tool was not offered is given out as the text it is.
"""

import dataclasses
import json
import uuid
from collections.abc import Generator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from glm5_jax.errors import InputError
from glm5_jax.inference.text import overlap
from glm5_jax.strict_json import parse_json

_THINK, _THINK_END = "<think>", "</think>"
_CALL, _CALL_END = "<tool_call>", "</tool_call>"
_KEY, _KEY_END = "<arg_key>", "</arg_key>"
_VALUE, _VALUE_END = "<arg_value>", "</arg_value>"
# What decoding must keep in the text, though a tokenizer may call it special.
TAGS = frozenset({_THINK, _THINK_END, _CALL, _CALL_END, _KEY, _KEY_END, _VALUE, _VALUE_END})
_SPACE = " \t\r\n"
_GAP = 64  # most characters of whitespace between parts
_TYPES: Mapping[type, tuple[str, ...]] = {  # the JSON types that parsed values count as
    type(None): ("null",),
    bool: ("boolean",),
    int: ("integer", "number"),
    float: ("number",),
    str: ("string",),
    list: ("array",),
    dict: ("object",),
}


@dataclasses.dataclass(frozen=True)
class Reasoning:
    """More text that the model thought."""

    text: str


@dataclasses.dataclass(frozen=True)
class Content:
    """More text for the user."""

    text: str


@dataclasses.dataclass(frozen=True)
class CallStart:
    """A tool call; its arguments follow."""

    index: int  # among the calls of the answer
    id: str
    name: str


@dataclasses.dataclass(frozen=True)
class CallArguments:
    """More of the JSON object of a call's arguments."""

    index: int
    text: str


Piece: TypeAlias = Reasoning | Content | CallStart | CallArguments
_Result = TypeVar("_Result")
_Reading: TypeAlias = Generator[None, None, _Result]  # yields where it needs more text


def starts_thinking(prompt: str) -> bool:
    """Whether the answer to a rendered prompt begins inside the reasoning."""
    return prompt.rstrip(_SPACE).endswith(_THINK)


class ReplyParser:
    """Takes one answer apart; how it is cut into pushes does not change what comes out.

    Calls are given out when they are complete, since only then it is clear that they are calls.
    """

    def __init__(self, thinking: bool, tools: Sequence[Mapping[str, Any]] = ()):
        """Prepares for an answer.

        Args:
          thinking: whether it begins inside the reasoning; see `starts_thinking`.
          tools: those offered, as OpenAI's API has them. Without any, calls are content.

        Raises:
          InputError: a tool is not in OpenAI's format.
        """
        self._tools = dict(_tool(tool, f"tools[{n}]") for n, tool in enumerate(tools))
        self._text = ""  # not given out yet
        self._ended = False
        self._pieces: list[Piece] = []
        self._num_calls = 0
        self._reading = self._answer(thinking)
        next(self._reading)

    def push(self, text: str) -> list[Piece]:
        """Takes more of the answer; returns what is clear now."""
        self._text += text
        next(self._reading)
        return self._taken()

    def finish(self) -> list[Piece]:
        """Returns what was held back; call it once, at the end of the answer."""
        self._ended = True
        for _ in self._reading:
            raise AssertionError("waits for text after the end")
        return self._taken()

    def _taken(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def _answer(self, thinking: bool) -> _Reading[None]:
        if not thinking:  # where the prompt leaves it open, the model begins to reason itself
            tag, end = yield from self._tag(0, (_THINK,))
            if tag:
                thinking, self._text = True, self._text[end:]
        if thinking:
            yield from self._reasoning()
        yield from self._content()

    def _reasoning(self) -> _Reading[None]:
        found = False
        while not found and (self._text or not self._ended):
            end = self._text.find(_THINK_END)
            found = end >= 0
            if not found:
                held = 0 if self._ended else overlap(self._text, (_THINK_END,))
                end = len(self._text) - held
            self._give(Reasoning, end)
            if found:
                self._text = self._text[len(_THINK_END) :]
            elif not self._ended:
                yield

    def _content(self) -> _Reading[None]:
        """Gives out content and calls, without whitespace before a call or between two."""
        calls = (_CALL,) if self._tools else ()
        blank = True  # no content since the beginning or the last call
        given = False
        while self._text or not self._ended:
            if not given:
                self._text = self._text.lstrip("\n")
            start = self._text.find(_CALL) if calls else -1
            held = 0 if self._ended else overlap(self._text, calls)
            text = self._text[: len(self._text) - held if start < 0 else start]
            gap = text[-_GAP:]
            shown = len(text) - len(gap) + len(gap.rstrip(_SPACE))
            if shown:
                given, blank = True, False
            self._give(Content, shown)
            if start >= 0:
                called = yield from self._call(start - shown)
                given, blank = given or not called, called
            elif not self._ended:
                yield
            else:
                self._give(Content, 0 if blank and self._num_calls else len(self._text))
                self._text = ""

    def _give(self, kind: type[Reasoning] | type[Content], size: int) -> None:
        """Gives out the first characters of the text."""
        if size:
            self._pieces.append(kind(self._text[:size]))
            self._text = self._text[size:]

    def _call(self, start: int) -> _Reading[bool]:
        """Gives out the call that begins here, or if there is none its first tag as content."""
        name, at = yield from self._name(start + len(_CALL))
        arguments: dict[str, str] | None = None
        if name is not None:
            arguments, at = yield from self._arguments(at, self._tools[name])
        if name is None or arguments is None:
            self._give(Content, start + len(_CALL))
            return False
        self._text = self._text[at:]
        pairs = (f"{json.dumps(key, ensure_ascii=False)}: {v}" for key, v in arguments.items())
        index, self._num_calls = self._num_calls, self._num_calls + 1
        self._pieces.append(CallStart(index, f"call_{uuid.uuid4().hex}", name))
        self._pieces.append(CallArguments(index, "{" + ", ".join(pairs) + "}"))
        return True

    def _name(self, at: int) -> _Reading[tuple[str | None, int]]:
        """Reads the name of a tool that was offered, and stops before what follows it."""
        while True:
            name, bracket, _ = self._text[at:].partition("<")
            read = name.strip(_SPACE)
            near = len(name) - len(read) <= _GAP
            known = near and any(tool.startswith(read) for tool in self._tools)
            if bracket or self._ended or not known:
                called = bracket and known and read in self._tools
                return (read if called else None), at + len(name)
            yield

    def _arguments(
        self, at: int, properties: Mapping[str, Any]
    ) -> _Reading[tuple[dict[str, str] | None, int]]:
        """Reads a call from after its name to its end; values are returned as JSON."""
        arguments: dict[str, str] = {}
        tag, at = yield from self._tag(at, (_KEY, _CALL_END))
        while tag == _KEY:
            end = yield from self._find(_KEY_END, at)
            key = self._text[at:end]
            if end < 0 or key in arguments:
                return None, at
            tag, start = yield from self._tag(end + len(_KEY_END), (_VALUE,))
            if tag is None:
                return None, at
            tag, end, at = yield from self._value_end(start)
            arguments[key] = _json_value(self._text[start:end], properties.get(key))
        return (arguments if tag else None), at

    def _value_end(self, at: int) -> _Reading[tuple[str | None, int, int]]:
        """What follows a value, where the value ends, and where what follows it does."""
        while True:
            end = yield from self._find(_VALUE_END, at)
            if end < 0:
                return None, at, at
            tag, at = yield from self._tag(end + len(_VALUE_END), (_KEY, _CALL_END))
            if tag:  # otherwise the value contains what looks like its end
                return tag, end, at

    def _find(self, tag: str, at: int) -> _Reading[int]:
        """Where a tag stands, at an index or after it; -1 if it does not."""
        while (found := self._text.find(tag, at)) < 0 and not self._ended:
            at = max(at, len(self._text) - len(tag) + 1)
            yield
        return found

    def _tag(self, at: int, tags: Sequence[str]) -> _Reading[tuple[str | None, int]]:
        """The one of several tags that comes next but for whitespace, and where it ends."""
        while True:
            rest = self._text[at:].lstrip(_SPACE)
            begin = len(self._text) - len(rest)
            near = begin - at <= _GAP
            for tag in tags:
                if near and rest.startswith(tag):
                    return tag, begin + len(tag)
            if self._ended or not near or not any(tag.startswith(rest) for tag in tags):
                return None, at
            yield


def _tool(tool: Mapping[str, Any], where: str) -> tuple[str, Mapping[str, Any]]:
    """The name of a tool and the schemas of its arguments."""
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise InputError(f"{where}.function is {function!r:.80}, expected an object")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise InputError(f"{where}.function.name is {name!r:.80}, expected a name")
    parameters = function.get("parameters") or {}
    properties = parameters.get("properties", {}) if isinstance(parameters, Mapping) else None
    if not isinstance(properties, Mapping):
        raise InputError(
            f"{where}.function.parameters is {parameters!r:.80}, expected the schema of an object"
        )
    return name, properties


def _json_value(text: str, schema: object) -> str:
    """A value as JSON: what it says if that is allowed and no string, else the string it is."""
    types = _types(schema)
    as_string = json.dumps(text, ensure_ascii=False)
    try:
        parsed = parse_json(f'{{"value": {text}}}', "value")
    except InputError:
        return as_string
    fits = parsed.keys() == {"value"} and not isinstance(parsed["value"], str)
    if fits and "string" in types:
        fits = not types.isdisjoint(_TYPES[type(parsed["value"])])
    return text.strip(_SPACE) if fits else as_string


def _types(schema: object) -> set[str]:
    """The JSON types that a schema allows; none if it does not say."""
    if not isinstance(schema, Mapping):
        return set()
    choices = [schema.get(key) for key in ("anyOf", "oneOf")]
    schemas = [schema, *(one for some in choices if isinstance(some, list) for one in some)]
    types: set[str] = set()
    for one in schemas:
        if isinstance(one, Mapping):
            declared = one.get("type")
            named = declared if isinstance(declared, list) else [declared]
            types.update(name for name in named if isinstance(name, str))
            listed = one.get("enum")
            values = listed if isinstance(listed, list) else []
            types.update(*(_TYPES[type(value)] for value in values))
    return types
