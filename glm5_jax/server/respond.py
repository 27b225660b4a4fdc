"""Sending answers: whole, or in server-sent events as they are generated."""

import asyncio
import functools
import json
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Sequence, Set
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from glm5_jax.inference import request as engine
from glm5_jax.inference.continuation import Continuation, Part
from glm5_jax.server.answer import Answer
from glm5_jax.server.errors import GONE, ApiError
from glm5_jax.server.protocol import Body
from glm5_jax.server.service import Service

Choice = dict[str, Any]  # an entry of `choices`


class Form(Protocol):
    """How answers of one kind look."""

    prefix: str  # of their ids
    name: str  # of the object
    chunk_name: str  # of its parts in a stream
    keep: Set[str]  # texts of special tokens that are text here

    def begin(self, place: int) -> list[Choice]:
        """What a stream says of a choice before its first token."""
        ...

    def add(self, place: int, part: Part) -> list[Choice]:
        """What a stream says of a choice that goes on."""
        ...

    def join(self, said: Sequence[Choice]) -> Choice:
        """All that a stream would have said of a choice, at once."""
        ...


async def respond(
    request: Request,
    service: Service,
    body: Body,
    asked: Sequence[engine.Request],
    form: Form,
) -> Response:
    """Continues prompts, and answers in the given form.

    Raises:
      ApiError: there is no answer, or no whole one where no stream was asked for.
    """
    decode = functools.partial(service.tokenizer.decode, keep=form.keep)
    continuations = [Continuation(decode, body.stop) for _ in asked]
    head = {
        "id": f"{form.prefix}-{uuid.uuid4().hex}",
        "object": form.chunk_name if body.stream else form.name,
        "created": int(time.time()),
        "model": service.name,
    }
    if not body.stream:
        return await _unless_gone(request, _whole(service, head, asked, continuations, form))
    answer = service.worker.submit(asked, service.limits.seconds)
    with_usage = body.stream_options is not None and body.stream_options.include_usage

    async def chunks() -> AsyncIterator[dict[str, Any]]:
        more = {"usage": None} if with_usage else {}
        async for choice in _said(answer, continuations, form):
            yield head | {"choices": [choice]} | more
        if with_usage:
            yield head | {"choices": [], "usage": _usage(asked, continuations)}

    return _EventStream(answer, chunks())


async def _whole(
    service: Service,
    head: dict[str, Any],
    asked: Sequence[engine.Request],
    continuations: Sequence[Continuation],
    form: Form,
) -> Response:
    said: list[list[Choice]] = [[] for _ in asked]
    async with service.worker.submit(asked, service.limits.seconds) as answer:
        async for choice in _said(answer, continuations, form):
            said[choice["index"]].append(choice)
    choices = [form.join(each) for each in said]
    return JSONResponse(head | {"choices": choices, "usage": _usage(asked, continuations)})


async def _said(
    answer: Answer, continuations: Sequence[Continuation], form: Form
) -> AsyncIterator[Choice]:
    for place in range(len(continuations)):
        for choice in form.begin(place):
            yield choice
    async for place, event in answer:
        for choice in form.add(place, continuations[place].push(event)):
            if choice["finish_reason"] is not None:
                answer.cancel(place)
            yield choice


def _usage(
    asked: Sequence[engine.Request], continuations: Sequence[Continuation]
) -> dict[str, Any]:
    """What an answer took; details where no stop string left the engine without the last word."""
    first = [number for number, one in enumerate(asked) if one.number == 0]  # of each prompt
    prompt = sum(len(asked[number].prompt) for number in first)
    generated = sum(continuation.count for continuation in continuations)
    usage: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
    }
    works = [continuation.work for continuation in continuations]
    known = [work for work in works if work is not None]
    if len(known) == len(works):
        accepted = sum(work.accepted_tokens for work in known)
        rejected = sum(work.drafted_tokens for work in known) - accepted
        usage["prompt_tokens_details"] = {
            "cached_tokens": sum(known[number].reused_tokens for number in first)
        }
        usage["completion_tokens_details"] = {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": rejected,
        }
    return usage


class _EventStream(StreamingResponse):
    """Server-sent events; the answer's slots are freed however sending them ends."""

    def __init__(self, answer: Answer, chunks: AsyncIterator[dict[str, Any]]):
        unbuffered = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # by proxies
        super().__init__(_events(chunks), headers=unbuffered, media_type="text/event-stream")
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._answer:
            await super().__call__(scope, receive, send)


async def _events(chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    try:
        async for chunk in chunks:
            yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
    except ApiError as error:  # too late for a status
        yield f"data: {json.dumps(error.body())}\n\n"
    yield "data: [DONE]\n\n"


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """Does work for a client, and gives it up if the client goes away."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_departure(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        return Response(status_code=GONE)
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _departure(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
