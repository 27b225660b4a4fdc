"""Generating text: continuations of a list of prompts."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from glm5_jax.collectives import BATCH
from glm5_jax.inference.engine import Engine
from glm5_jax.inference.request import Request, Sampling, check_request
from glm5_jax.model import Glm5
from glm5_jax.sharding import Partition, on_one_device

_MOST_TOGETHER = 32  # prompts that are continued at a time
_SHORTEST_CONTEXT, _COARSE_CONTEXT = 64, 1024


class Token(NamedTuple):
    """A token that was generated."""

    prompt: int  # which prompt it continues
    token: int
    finish_reason: str | None  # "stop" or "length" at the last one


class Completion(NamedTuple):
    """A whole continuation."""

    tokens: list[int]  # the new ones, with the token that stopped it, if one did
    finish_reason: str


class Generator:
    """Continues prompts. An `Engine` does it; it is made when the first prompts are known."""

    def __init__(
        self,
        model: Glm5,
        partition: Partition | None = None,
        *,
        stop: frozenset[int] = frozenset(),
        num_tokens: int | None = None,
        context: int | None = None,
        draft_tokens: int = 0,
    ):
        """Remembers how texts are to be generated.

        Args:
          partition: how the model lies on a mesh; on the first device unless given.
          stop: tokens that end a text.
          num_tokens: ids from here on are not generated; the vocabulary's size unless given.
          context: the most tokens of a prompt and its continuation together; what the model was
            made for unless given, and no more than that.
          draft_tokens: that the MTP layer drafts at a time.
        """
        self.config = model.config
        self._model = model
        self._partition = partition or on_one_device()
        self._stop = stop
        self._num_tokens = num_tokens
        self._context = min(context or self.config.max_positions, self.config.max_positions)
        self._draft_tokens = draft_tokens
        self._engine: Engine | None = None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        first_number: int = 0,
    ) -> Iterator[Token]:
        """Continues prompts together; yields tokens as they come, those of all prompts interleaved.

        Args:
          first_number: number of the first prompt. A prompt draws its tokens by the seed and its
            number, so that its text does not depend on which others it is continued with.

        Raises:
          InputError: a prompt is empty, too long, or has a token outside the vocabulary.
        """
        requests = [
            Request(
                prompt=tuple(prompt),
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                number=number,
                stop=self._stop,
            )
            for number, prompt in enumerate(prompts, start=first_number)
        ]
        if not requests:
            return
        for request in requests:
            name = f"prompt {request.number + 1}"
            check_request(request, self.config.vocab_size, self._context, name)
        engine = self._engine_for(requests)
        places = {engine.submit(request): place for place, request in enumerate(requests)}
        try:
            while not engine.is_idle:
                for event in engine.step():
                    yield Token(places[event.request], event.token, event.finish_reason)
        finally:
            for number in places:
                engine.cancel(number)

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        first_number: int = 0,
    ) -> list[Completion]:
        """The whole continuation of every prompt; arguments and errors are those of `generate`."""
        tokens: list[list[int]] = [[] for _ in prompts]
        reasons = [""] * len(prompts)
        for event in self.generate(prompts, max_new_tokens, sampling, first_number):
            tokens[event.prompt].append(event.token)
            reasons[event.prompt] = event.finish_reason or ""
        return [Completion(*pair) for pair in zip(tokens, reasons, strict=True)]

    def _engine_for(self, requests: Sequence[Request]) -> Engine:
        """The engine there is if it is large enough, or else one that is.

        Sizes are rounded up, so that prompts of many lengths share a few compiled steps.
        """
        num_shards = self._partition.num_shards(BATCH)
        slots = -(-min(len(requests), _MOST_TOGETHER) // num_shards) * num_shards
        longest = max(len(request.prompt) + request.max_new_tokens for request in requests)
        engine = self._engine
        if engine and engine.is_idle and engine.slots >= slots and engine.context >= longest:
            return engine
        context = min(_bucket(longest), self._context)
        self._engine = Engine(
            self._model,
            self._partition,
            slots=slots,
            context=context,
            num_tokens=self._num_tokens,
            cache_tokens=slots * context,
            draft_tokens=self._draft_tokens,
        )
        return self._engine


def _bucket(length: int) -> int:
    """The next power of two, or for long contexts the next multiple of 1024."""
    if length > _COARSE_CONTEXT:
        return -(-length // _COARSE_CONTEXT) * _COARSE_CONTEXT
    return max(_SHORTEST_CONTEXT, 1 << (length - 1).bit_length())
