"""`/v1/completions`: prompts are continued as they are."""

from collections.abc import Sequence, Set
from typing import Any

from fastapi import Request, Response

from glm5_jax.inference.continuation import Part, Scored
from glm5_jax.inference.tokenizer import Tokenizer
from glm5_jax.server.asking import check_number, engine_requests
from glm5_jax.server.errors import unsupported
from glm5_jax.server.protocol import CompletionBody
from glm5_jax.server.respond import Choice, respond
from glm5_jax.server.service import Service

_USUAL_LENGTH = 16  # as OpenAI has it


async def complete(request: Request, service: Service, body: CompletionBody) -> Response:
    """Answers a request; raises `ApiError` if it cannot be."""
    if body.echo and body.logprobs is not None:
        raise unsupported("logprobs", "log-probabilities of a prompt are not given, leave out echo")
    check_number(service, body, len(body.prompt))
    prompts = [
        await service.encode(prompt) if isinstance(prompt, str) else prompt
        for prompt in body.prompt
    ]
    asked = engine_requests(
        service,
        body,
        prompts,
        max_tokens=body.max_tokens,
        usual=_USUAL_LENGTH,
        alternatives=body.logprobs,
    )
    echoed = body.prompt if body.echo else []
    form = CompletionForm(
        service.tokenizer,
        [prompt for prompt in echoed for _ in range(body.n)],
        scored=body.logprobs is not None,
    )
    return await respond(request, service, body, asked, form)


class CompletionForm:
    """How completions look."""

    prefix, name, chunk_name = "cmpl", "text_completion", "text_completion"
    keep: Set[str] = frozenset()

    def __init__(
        self, tokenizer: Tokenizer, echoed: Sequence[str | Sequence[int]], *, scored: bool
    ):
        """Prepares for an answer.

        Args:
          echoed: the prompt of each choice, where choices begin with it.
          scored: whether log-probabilities are shown.
        """
        self._tokenizer, self._echoed, self._scored = tokenizer, echoed, scored

    def begin(self, place: int) -> list[Choice]:
        """The prompt, if it is wanted."""
        if not self._echoed:
            return []
        prompt = self._echoed[place]
        text = prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)
        return [self._choice(place, text, [], None)]

    def add(self, place: int, part: Part) -> list[Choice]:
        """The text, as it comes."""
        if not part.text and not part.scored and part.finish_reason is None:
            return []
        return [self._choice(place, part.text, part.scored, part.finish_reason)]

    def join(self, said: Sequence[Choice]) -> Choice:
        """The whole text."""
        logprobs: dict[str, Any] | None = None
        if self._scored:
            lists = [choice["logprobs"] for choice in said]
            logprobs = {name: sum((each[name] for each in lists), []) for name in lists[0]}
        text = "".join(choice["text"] for choice in said)
        return said[-1] | {"text": text, "logprobs": logprobs}

    def _choice(
        self, place: int, text: str, scored: Sequence[Scored], reason: str | None
    ) -> Choice:
        logprobs = self._logprobs(scored) if self._scored else None
        return {"index": place, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, scored: Sequence[Scored]) -> dict[str, Any]:
        return {
            "tokens": [self._text(one.token) for one in scored],
            "token_logprobs": [one.likelihood.logprob for one in scored],
            "top_logprobs": [
                {
                    self._text(token): logprob
                    for token, logprob in (
                        *one.likelihood.alternatives,
                        (one.token, one.likelihood.logprob),
                    )
                }
                for one in scored
            ],
            "text_offset": [one.offset for one in scored],
        }

    def _text(self, token: int) -> str:
        """The text of a token, or its bytes if they are but a part of a character."""
        text, content = self._tokenizer.token_text(token)
        if text.encode() == bytes(content):
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
