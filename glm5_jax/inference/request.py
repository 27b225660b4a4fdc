"""What is asked of the engine, and what it answers."""

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from glm5_jax.errors import InputError

MOST_ALTERNATIVES = 20  # that are shown beside a token
LARGEST_SEED = 2**32 - 1  # jax.random.key drops higher bits


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise InputError(f"{name} is {value!r:.80}, expected {expected}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn; the defaults take the likeliest.

    What it changes, in this order: penalties and biases, temperature, then what is left out.
    """

    temperature: float = 0.0  # 0 takes the most likely token
    top_k: int = 0  # leave out all but so many of the likeliest tokens; 0 leaves out none
    top_p: float = 1.0  # of these, all but the likeliest that together are so probable
    min_p: float = 0.0  # and those less probable than this part of the likeliest
    repetition_penalty: float = 1.0  # divides positive scores of tokens seen, multiplies others
    presence_penalty: float = 0.0  # taken from the score of tokens that were generated
    frequency_penalty: float = 0.0  # the same, for every time that they were
    logit_bias: Mapping[int, float] = dataclasses.field(
        default_factory=lambda: MappingProxyType({}), hash=False
    )  # added to the scores of tokens
    seed: int = 0

    def __post_init__(self) -> None:
        finite = math.isfinite
        temperature, repetition = self.temperature, self.repetition_penalty
        _require(
            finite(temperature) and temperature >= 0,
            "temperature",
            temperature,
            "a number of at least 0",
        )
        _require(0 <= self.top_k < 2**31, "top_k", self.top_k, f"an integer from 0 to {2**31 - 1}")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "a number above 0 and up to 1")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "a number from 0 to 1")
        _require(
            1e-3 <= repetition <= 1e3,
            "repetition_penalty",
            repetition,
            "a number from 0.001 to 1000",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(-2 <= value <= 2, name, value, "a number from -2 to 2")
        for token, value in self.logit_bias.items():
            _require(
                -100 <= value <= 100, f"logit_bias of token {token}", value, "from -100 to 100"
            )
        _require(
            0 <= self.seed <= LARGEST_SEED,
            "seed",
            self.seed,
            f"an integer from 0 to {LARGEST_SEED}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to continue."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    # Which of several continuations with one seed this is: each draws tokens of its own.
    number: int = 0
    stop: frozenset[int] = frozenset()  # tokens that end the text
    alternatives: int | None = None  # log-probabilities: of how many likeliest tokens beside it

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        wanted = self.alternatives
        _require(
            wanted is None or 0 <= wanted <= MOST_ALTERNATIVES,
            "alternatives",
            wanted,
            f"an integer from 0 to {MOST_ALTERNATIVES}",
        )


def check_request(request: Request, vocabulary: int, context: int, name: str) -> None:
    """Raises `InputError` if a request cannot be continued, calling its prompt by that name."""
    for tokens, where in ((request.prompt, name), (request.sampling.logit_bias, "logit_bias")):
        for token in tokens:
            if not 0 <= token < vocabulary:
                raise InputError(
                    f"{where}: token {token} is outside the vocabulary, expected 0 <= token < "
                    f"{vocabulary}"
                )
    length, new = len(request.prompt), request.max_new_tokens
    if not length:
        raise InputError(f"{name} is empty, expected at least one token")
    if length + new > context:
        raise InputError(
            f"{name} has {length} tokens and with {new} new ones needs a context of "
            f"{length + new}, expected at most {context}"
        )


class Likelihood(NamedTuple):
    """How likely the model itself found a token, before temperature and all else."""

    logprob: float
    alternatives: tuple[tuple[int, float], ...]  # the likeliest tokens, the likeliest first


class Work(NamedTuple):
    """What a request took."""

    reused_tokens: int  # of the prompt, not read because a request before began alike
    main_steps: int  # one for every token but for those drafted
    drafted_tokens: int
    accepted_tokens: int


class Event(NamedTuple):
    """A token that was generated for a request."""

    request: int  # what `Engine.submit` returned
    token: int
    likelihood: Likelihood | None  # where asked for
    finish_reason: str | None  # at the last one: "stop" or "length"
    work: Work | None  # at the last one


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What an engine has done and holds, for metrics and logs."""

    slots: int  # requests that are continued at a time
    running: int  # that are now
    waiting: int
    finished: int  # since the start, cancelled ones too
    prompt_tokens: int  # of requests that were begun
    generated_tokens: int
    work: Work  # of all requests together
    pages: int  # of the cache
    pages_held: int  # by running requests
    pages_kept: int  # by none, for prompts that begin alike
    compilations: int  # of steps, since the engine was made
