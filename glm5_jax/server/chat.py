"""`/v1/chat/completions`: the assistant's turn in a conversation."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from fastapi import Request, Response

from glm5_jax.errors import InputError
from glm5_jax.inference.continuation import Part, Scored
from glm5_jax.inference.reply import (
    TAGS,
    CallArguments,
    CallStart,
    Content,
    Piece,
    Reasoning,
    ReplyParser,
    starts_thinking,
)
from glm5_jax.inference.tokenizer import Tokenizer
from glm5_jax.server.asking import check_number, engine_requests
from glm5_jax.server.errors import ApiError
from glm5_jax.server.protocol import ChatBody
from glm5_jax.server.respond import Choice, respond
from glm5_jax.server.service import Service


async def chat(request: Request, service: Service, body: ChatBody) -> Response:
    """Answers a request; raises `ApiError` if it cannot be."""
    if len(body.messages) > service.limits.messages:
        raise ApiError(
            400,
            f"there are {len(body.messages)} messages, expected at most {service.limits.messages}",
            code="too_many_messages",
            param="messages",
        )
    check_number(service, body, 1)
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools]
    if body.tool_choice == "none":
        tools = []
    prompt = await asyncio.to_thread(_render, service.tokenizer, body, tools)
    asked = engine_requests(
        service,
        body,
        [await service.encode(prompt, special=False)],
        max_tokens=body.max_completion_tokens or body.max_tokens,
        usual=None,
        alternatives=(body.top_logprobs or 0) if body.logprobs else None,
    )
    parsers = [_parser(prompt, tools) for _ in asked]
    form = ChatForm(
        service.tokenizer, parsers, scored=body.logprobs, parallel=body.parallel_tool_calls
    )
    return await respond(request, service, body, asked, form)


def _render(tokenizer: Tokenizer, body: ChatBody, tools: list[dict[str, Any]]) -> str:
    options = dict(body.chat_template_kwargs)
    if body.reasoning_effort is not None:
        options["reasoning_effort"] = body.reasoning_effort
    messages = [message.model_dump(exclude_none=True) for message in body.messages]
    try:
        return tokenizer.render_chat(messages, tools=tools or None, options=options)
    except InputError as error:
        raise ApiError(400, str(error), code="invalid_value", param="messages") from None


def _parser(prompt: str, tools: Sequence[Mapping[str, Any]]) -> ReplyParser:
    try:
        return ReplyParser(starts_thinking(prompt), tools)
    except InputError as error:
        raise ApiError(400, str(error), code="invalid_value", param="tools") from None


class ChatForm:
    """How the assistant's turns look; one parser takes one choice apart."""

    prefix, name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"
    keep: Set[str] = TAGS

    def __init__(
        self, tokenizer: Tokenizer, parsers: Sequence[ReplyParser], *, scored: bool, parallel: bool
    ):
        """Prepares for an answer.

        Args:
          scored: whether log-probabilities are shown.
          parallel: whether a turn may have several calls; else it ends with the first.
        """
        self._tokenizer, self._parsers = tokenizer, parsers
        self._scored, self._parallel = scored, parallel
        self._called: set[int] = set()  # places with tool calls

    def begin(self, place: int) -> list[Choice]:
        """Whose turn it is."""
        return [self._choice(place, {"role": "assistant", "content": ""})]

    def add(self, place: int, part: Part) -> list[Choice]:
        """Reasoning, content and calls, as they come."""
        parser, reason = self._parsers[place], part.finish_reason
        pieces = parser.push(part.text)
        if reason is not None:
            pieces += parser.finish()
        calls = [piece for piece in pieces if isinstance(piece, CallArguments)]
        if calls:
            self._called.add(place)
        if calls and not self._parallel:
            pieces, reason = pieces[: pieces.index(calls[0]) + 1], "stop"
        if reason == "stop" and place in self._called:
            reason = "tool_calls"
        deltas = [_delta(piece) for piece in pieces]
        if not deltas and (part.scored or reason is not None):
            deltas = [{}]
        choices = [self._choice(place, delta) for delta in deltas]
        if choices:
            choices[-1]["finish_reason"] = reason
            if self._scored:
                choices[-1]["logprobs"] = self._logprobs(part.scored)
        return choices

    def join(self, said: Sequence[Choice]) -> Choice:
        """The whole turn."""
        deltas = [choice["delta"] for choice in said]
        content, reasoning = (_text_of(deltas, name) for name in ("content", "reasoning_content"))
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if reasoning:
            message["reasoning_content"] = reasoning
        calls = _joined_calls(call for delta in deltas for call in delta.get("tool_calls", ()))
        if calls:
            message |= {"content": content or None, "tool_calls": calls}
        scored = [choice["logprobs"]["content"] for choice in said if choice["logprobs"]]
        return {
            "index": said[-1]["index"],
            "message": message,
            "logprobs": {"content": sum(scored, [])} if self._scored else None,
            "finish_reason": said[-1]["finish_reason"],
        }

    def _choice(self, place: int, delta: dict[str, Any]) -> Choice:
        return {"index": place, "delta": delta, "logprobs": None, "finish_reason": None}

    def _logprobs(self, scored: Sequence[Scored]) -> dict[str, Any]:
        content = []
        for one in scored:
            alternatives = [self._entry(*pair) for pair in one.likelihood.alternatives]
            entry = self._entry(one.token, one.likelihood.logprob)
            content.append(entry | {"top_logprobs": alternatives})
        return {"content": content}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text, content = self._tokenizer.token_text(token)
        return {"token": text, "logprob": logprob, "bytes": content}


def _delta(piece: Piece) -> dict[str, Any]:
    match piece:
        case Reasoning(text):
            return {"reasoning_content": text}
        case Content(text):
            return {"content": text}
        case CallStart(index, call, name):
            function = {"name": name, "arguments": ""}
            said = {"index": index, "id": call, "type": "function", "function": function}
        case CallArguments(index, text):
            said = {"index": index, "function": {"arguments": text}}
    return {"tool_calls": [said]}


def _text_of(deltas: Iterable[Mapping[str, Any]], name: str) -> str:
    return "".join(delta.get(name, "") for delta in deltas)


def _joined_calls(said: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    for one in said:
        if "id" in one:
            calls.append({"id": one["id"], "type": "function", "function": dict(one["function"])})
        else:
            calls[one["index"]]["function"]["arguments"] += one["function"]["arguments"]
    return calls
