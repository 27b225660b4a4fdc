"""How likely a model finds given text: log-probabilities of its tokens, and perplexity."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from glm5_jax.collectives import BATCH, share
from glm5_jax.config import Config
from glm5_jax.errors import InputError
from glm5_jax.inference.score import check_depth
from glm5_jax.inference.tokenizer import Tokenizer
from glm5_jax.mesh import fetch
from glm5_jax.model import Glm5, forward, predict_ahead
from glm5_jax.places import Places
from glm5_jax.queries import block_length, map_queries
from glm5_jax.sharding import ROWS, Partition, on_one_device, whole
from glm5_jax.vocabulary import cross_entropy, likeliest, scores

_SHORTEST = 32  # rows are padded to this length or a power of two times it
_MOST_NATS = 700  # per token; e to the power of more is no number


class Span(NamedTuple):
    """Tokens to read together, and which of them to score."""

    tokens: Sequence[int]
    first: int  # that is scored, at least 1; those before it are context only


class Scored(NamedTuple):
    """What a model makes of a span."""

    # By depth of prediction, float64, of the tokens from `first` on; of those only for which there
    # is a prediction at that depth, which begin with token 1 + depth of the span.
    logprobs: list[np.ndarray]
    is_likeliest: np.ndarray  # bool, whether greedy decoding would have chosen the token


class Scorer:
    """Finds log-probabilities of tokens; scores of the whole vocabulary stay on the devices."""

    def __init__(
        self,
        model: Glm5,
        partition: Partition | None = None,
        *,
        batch_size: int = 8,
        depth: int = 0,
    ):
        """Prepares a model for scoring.

        Args:
          partition: how the model lies on a mesh; on the first device unless given.
          batch_size: spans read at a time; rounded up to what the mesh divides evenly.
          depth: how many tokens further ahead than the next the MTP layer predicts.

        Raises:
          InputError: the model has no MTP layer to predict further ahead with.
        """
        check_depth(depth, model.config)
        partition = partition or on_one_device()
        self.config, self.depth = model.config, depth
        self._model = partition.place(model, Glm5(model.config))
        self._compute = _compiled(model.config, partition, depth)
        shards = partition.num_shards(BATCH)
        self._shards, self._batch_size = shards, batch_size

    def __call__(self, spans: Sequence[Span]) -> Iterator[tuple[int, Scored]]:
        """Scores spans, the longest first; yields each with its index.

        Raises:
          InputError: a token is outside the vocabulary.
        """
        order = sorted(range(len(spans)), key=lambda index: -len(spans[index].tokens))
        together = -(-min(self._batch_size, len(order)) // self._shards) * self._shards
        for start in range(0, len(order), together or 1):
            batch = order[start : start + together]
            scored = self._score([spans[index] for index in batch], together)
            yield from zip(batch, scored, strict=True)

    def _score(self, spans: Sequence[Span], rows: int) -> Iterator[Scored]:
        # The last token of a span is predicted, not read.
        lengths = np.zeros(rows, np.int32)
        lengths[: len(spans)] = [len(span.tokens) - 1 for span in spans]
        width = max(_SHORTEST, 1 << (int(lengths.max()) - 1).bit_length())
        tokens_BT = np.zeros((rows, width + 1), np.int32)
        for row, span in enumerate(spans):
            assert 1 <= span.first < len(span.tokens)
            tokens_BT[row, : len(span.tokens)] = _checked(span.tokens, self.config)
        found = self._compute(self._model, tokens_BT[:, :-1], tokens_BT[:, 1:], lengths)
        by_depth = [(fetch(nats_BT), fetch(hit_BT)) for nats_BT, hit_BT in found]
        for row, span in enumerate(spans):
            # Row i of depth d predicts token i + 1 + d.
            parts = [
                slice(max(span.first - 1 - depth, 0), max(len(span.tokens) - 1 - depth, 0))
                for depth in range(len(by_depth))
            ]
            logprobs = [
                -nats_BT[row, part].astype(np.float64)
                for part, (nats_BT, _) in zip(parts, by_depth, strict=True)
            ]
            yield Scored(logprobs, by_depth[0][1][row, parts[0]])


def _checked(tokens: Sequence[int], config: Config) -> Sequence[int]:
    wrong = [token for token in tokens if not 0 <= token < config.vocab_size]
    if wrong:
        raise InputError(
            f"token {wrong[0]} of the text is outside the vocabulary, expected 0 <= token < "
            f"{config.vocab_size}"
        )
    return tokens


Nats = list[tuple[jax.Array, jax.Array]]  # by depth: nats BT, and whether BT is the likeliest


@functools.cache
def _compiled(
    config: Config, partition: Partition, depth: int
) -> Callable[[Glm5, np.ndarray, np.ndarray, np.ndarray], Nats]:
    """Compiles `compute(model, tokens_BT, next_BT, length_B)`; rows are padded at their ends."""
    rules = partition.rules

    def compute(model: Glm5, tokens_BT: jax.Array, next_BT: jax.Array, length_B: jax.Array) -> Nats:
        tokens_BT, next_BT, length_B = (
            share(each, BATCH, 0) for each in (tokens_BT, next_BT, length_B)
        )
        batch, width = tokens_BT.shape
        places = Places.padded(jnp.arange(width) < length_B[:, None])
        hidden_BTD = forward(model, tokens_BT, places, rules=rules).hidden_BTD
        hiddens = [hidden_BTD]
        if depth:
            ahead = predict_ahead(model, hidden_BTD, tokens_BT, places, depth, rules=rules)
            hiddens += [hidden for hidden, _ in ahead]
        head_ZD = whole(model.head, Glm5(config).head, rules)

        def judge(hidden_BTD: jax.Array, given_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
            scores_BTZ = scores(head_ZD, hidden_BTD)
            return cross_entropy(scores_BTZ, given_BT), likeliest(scores_BTZ) == given_BT

        # A block holds scores and what they are exponentiated to, both float32.
        length = block_length(2 * 4 * batch * head_ZD.shape[0])
        found = []
        for hidden_BTD in hiddens:
            found.append(map_queries(judge, length, hidden_BTD, next_BT))
            next_BT = jnp.pad(next_BT[:, 1:], ((0, 0), (0, 1)))
        return found

    equal = PartitionSpec()
    in_specs = (partition.specs(Glm5(config)), equal, equal, equal)
    return jax.jit(partition.on_shards(compute, in_specs, ROWS))


class Document(NamedTuple):
    """A text as a model reads it."""

    tokens: list[int]
    first: int  # that is scored: after special tokens, or else after the first token
    num_bytes: int  # of the scored text in UTF-8


def special_prefix(tokenizer: Tokenizer) -> list[int]:
    """The special tokens that a tokenizer puts before a text."""
    plain, framed = tokenizer.encode("a", special=False), tokenizer.encode("a")
    return next(
        framed[:start]
        for start in range(len(framed) + 1)
        if framed[start : start + len(plain)] == plain
    )


def encode_document(text: str, tokenizer: Tokenizer, prefix: Sequence[int], name: str) -> Document:
    """Encodes a text to be scored.

    The special tokens before it are context. Without any its first token is, and the bytes of that
    are not counted.

    Raises:
      InputError: there is no token to score; `name` says of which text.
    """
    tokens = [*prefix, *tokenizer.encode(text, special=False)]
    first = max(len(prefix), 1)
    if len(tokens) <= first:
        raise InputError(
            f"{name}: {text!r:.80} has {len(tokens)} tokens, expected at least {first + 1}"
        )
    unscored = [] if prefix else tokenizer.token_text(tokens[0])[1]
    return Document(tokens, first, len(text.encode()) - len(unscored))


def check_lengths(documents: Sequence[Document], depth: int) -> None:
    """Raises `InputError` unless a document is long enough to predict that far ahead in."""
    longest = max(len(document.tokens) for document in documents)
    if longest < 2 + depth:
        raise InputError(
            f"--mtp is {depth}, but the longest text has {longest} tokens: expected at most "
            f"{longest - 2}"
        )


def check_windows(window: int, stride: int, depth: int, config: Config) -> None:
    """Raises `InputError` unless windows fit the model and overlap enough for every depth."""
    if not 2 <= window <= config.max_positions:
        raise InputError(
            f"--window is {window}, expected from 2 to the model's {config.max_positions}"
        )
    most = window - 1 - depth
    if not 1 <= stride <= most:
        further = f" and --mtp {depth}" if depth else ""
        raise InputError(
            f"--stride is {stride}, expected from 1 to {most} with --window {window}{further}"
        )


def cut_windows(document: Document, window: int, stride: int) -> Iterator[Span]:
    """Cuts a document so that each token is scored once.

    The first window begins the document. Each further one ends `stride` tokens after the one before
    it, the last one with the document, and scores what is new: a token is scored with all tokens
    before it, or at least `window - stride` of them.
    """
    tokens, scored = document.tokens, document.first
    for end in [*range(window, len(tokens), stride), len(tokens)]:
        start = max(end - window, 0)
        if scored < end:
            yield Span(tokens[start:end], scored - start)
            scored = end


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """How surprised a model was by tokens."""

    nats: float  # of all tokens together
    tokens: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def value(self) -> float:
        """The number of equally likely tokens that would surprise as much."""
        return math.exp(self.nats_per_token)

    def bits_per_byte(self, num_bytes: int) -> float:
        """The same by bytes of text, which no tokenizer changes."""
        return self.nats / math.log(2) / num_bytes


def measure(
    scorer: Scorer,
    documents: Sequence[Document],
    window: int,
    stride: int,
    advance: Callable[[int], None],
) -> list[Perplexity]:
    """The perplexity of documents, of the next token and of those further ahead by depth.

    Depth d predicts from token 1 + d of a document on.

    Args:
      documents: of which at least one is long enough for every depth (`check_lengths`).
      advance: is told how many tokens were scored.

    Raises:
      InputError: a token is outside the vocabulary, or the model's predictions are no numbers.
    """
    spans = [span for document in documents for span in cut_windows(document, window, stride)]
    nats, counts = np.zeros(1 + scorer.depth), np.zeros(1 + scorer.depth, int)
    for _, scored in scorer(spans):
        nats -= [logprobs.sum() for logprobs in scored.logprobs]
        counts += [len(logprobs) for logprobs in scored.logprobs]
        advance(len(scored.is_likeliest))
    results = [Perplexity(*pair) for pair in zip(nats.tolist(), counts.tolist(), strict=True)]
    for result in results:
        if not result.nats_per_token < _MOST_NATS:  # nor is it where it is not a number
            raise InputError(
                f"the model gives {result.nats_per_token} nats per token, expected less than "
                f"{_MOST_NATS}: its weights are damaged"
            )
    return results
