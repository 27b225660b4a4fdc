"""Generating text: prefill in portions, then one token at a time for all rows of a batch."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from glm5_jax.collectives import BATCH, MODEL, Axes
from glm5_jax.config import Config
from glm5_jax.errors import InputError
from glm5_jax.inference.sampling import Sampling
from glm5_jax.inference.steps import State, compiled_steps, empty_state
from glm5_jax.model import Glm5, for_decoding
from glm5_jax.sharding import Partition, on_one_device

PREFILL_LENGTH = 512  # tokens of a prompt read at once
_SMALLEST_BUCKET, _COARSE_BUCKET = 32, 1024
_HOTTEST = 1e30  # all tokens are equally likely long before


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
    """Continues prompts.

    Shapes are rounded up, so that prompts of many lengths share a few compiled steps.
    """

    def __init__(
        self,
        model: Glm5,
        partition: Partition | None = None,
        *,
        stop: frozenset[int] = frozenset(),
        num_tokens: int | None = None,
        context: int | None = None,
    ):
        """Prepares a model for generating.

        Args:
          partition: how the model lies on a mesh; on the first device unless given.
          stop: tokens that end a text.
          num_tokens: ids from here on are not generated; the vocabulary's size unless given.
          context: the most tokens of a prompt and its continuation together; what the model was
            made for unless given, and no more than that.
        """
        self.config = model.config
        self._partition = partition or on_one_device()
        self._model = self._partition.place(model, Glm5(self.config))
        if self._partition.platform == "cpu":
            self._model = for_decoding(self._model)
        self._stop = stop
        self._dtype = model.embedding.dtype
        self._steps = compiled_steps(
            self.config, self._partition, self._dtype, num_tokens or self.config.vocab_size
        )
        self._context = context

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
            number, so that its text does not depend on which others it is batched with.

        Raises:
          InputError: a prompt is empty, too long, or has a token outside the vocabulary.
        """
        for number, prompt in enumerate(prompts):
            name = f"prompt {first_number + number + 1}"
            check_prompt(prompt, max_new_tokens, self.config, self._context, name)
        if not prompts:
            return
        # Shards are equal: rows that make up the batch, and slots the capacity, stay empty.
        batch = _rounded(len(prompts), self._partition, BATCH)
        number_B = np.arange(first_number, first_number + batch)
        temperature = np.float32(min(sampling.temperature, _HOTTEST))
        capacity = capacity_for(max(map(len, prompts)) + max_new_tokens, self._partition)
        state = empty_state(self.config, self._partition, batch, capacity, self._dtype)
        state = self._prefill(prompts, state)
        running = np.arange(batch) < len(prompts)
        for count in range(1, max_new_tokens + 1):
            token_B = self._steps.draw(
                state.logits_BZ, temperature, np.uint32(sampling.seed), number_B, count
            )
            for row, token in enumerate(np.asarray(token_B).tolist()):
                if running[row]:
                    reason = "stop" if token in self._stop else None
                    reason = reason or ("length" if count == max_new_tokens else None)
                    yield Token(row, token, reason)
                    running[row] = reason is None
            if not running.any():
                return
            count_B = running.astype(np.int32)
            state = self._steps.read(self._model, state, np.asarray(token_B)[:, None], count_B)

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

    def _prefill(self, prompts: Sequence[Sequence[int]], state: State) -> State:
        """Reads prompts of any lengths."""
        batch = state.logits_BZ.shape[0]
        lengths = np.zeros(batch, np.int32)
        lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
        portion = min(PREFILL_LENGTH, _bucket(int(lengths.max())))
        num_portions = -(-int(lengths.max()) // portion)
        tokens = np.zeros((batch, num_portions * portion), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        for start in range(0, num_portions * portion, portion):
            count_B = np.clip(lengths - start, 0, portion)
            part = tokens[:, start : start + portion]
            state = self._steps.read(self._model, state, part, count_B)
        return state


def check_prompt(
    prompt: Sequence[int], max_new_tokens: int, config: Config, context: int | None, name: str
) -> None:
    """Raises `InputError` if a prompt cannot be continued by that many tokens."""
    if not prompt:
        raise InputError(f"{name} is empty, expected at least one token")
    for token in prompt:
        if not 0 <= token < config.vocab_size:
            raise InputError(
                f"{name}: token {token} is outside the vocabulary, expected 0 <= token < "
                f"{config.vocab_size}"
            )
    needed, most = len(prompt) + max_new_tokens, config.max_positions
    if context is not None:
        most = min(most, context)
    if needed > most:
        raise InputError(
            f"{name} has {len(prompt)} tokens and with {max_new_tokens} new ones needs a context "
            f"of {needed}, expected at most {most}"
        )


def capacity_for(length: int, partition: Partition) -> int:
    """The slots of a cache for that many tokens of a row."""
    return _rounded(_bucket(length), partition, (MODEL,))


def _rounded(size: int, partition: Partition, axes: Axes) -> int:
    """The size rounded up to a multiple of what the axes of the mesh divide it into."""
    shards = partition.num_shards(axes)
    return -(-size // shards) * shards


def _bucket(length: int) -> int:
    """The next power of two, or for long contexts the next multiple of 1024."""
    if length > _COARSE_BUCKET:
        return -(-length // _COARSE_BUCKET) * _COARSE_BUCKET
    return max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length())
