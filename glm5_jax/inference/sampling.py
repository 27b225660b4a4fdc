"""Choosing the next tokens of a batch, each row in a way of its own."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from glm5_jax.inference.request import Request, Sampling

Numbers: TypeAlias = Any  # arrays of numpy on the host, of JAX in the compiled steps

_HOTTEST = 1e30  # all tokens are equally likely long before
_NONE = Sampling()


class Choices(NamedTuple):
    """The `Sampling` of each row."""

    temperature_B: Numbers
    top_k_B: Numbers
    top_p_B: Numbers
    min_p_B: Numbers
    repetition_B: Numbers
    presence_B: Numbers
    frequency_B: Numbers
    is_biased_B: Numbers
    seed_B: Numbers
    number_B: Numbers

    @classmethod
    def of(cls, requests: Sequence[Request | None]) -> "Choices":
        """Those of the requests; rows without one take the likeliest."""
        ways = [_NONE if each is None else each.sampling for each in requests]
        numbers = [0 if each is None else each.number for each in requests]

        def column(dtype: type, name: str) -> np.ndarray:
            return np.array([getattr(way, name) for way in ways], dtype)

        return cls(
            np.minimum(column(np.float64, "temperature"), _HOTTEST).astype(np.float32),
            column(np.int32, "top_k"),
            column(np.float32, "top_p"),
            column(np.float32, "min_p"),
            column(np.float32, "repetition_penalty"),
            column(np.float32, "presence_penalty"),
            column(np.float32, "frequency_penalty"),
            np.array([bool(way.logit_bias) for way in ways]),
            column(np.uint32, "seed"),
            np.array(numbers, np.int32),
        )


class Seen(NamedTuple):
    """What bears on the scores of each row's tokens."""

    bias_BZ: jax.Array  # float32
    in_prompt_BZ: jax.Array  # bool
    generated_BZ: jax.Array  # int32, how often

    def having(self, token_B: jax.Array, counts_B: jax.Array) -> "Seen":
        """With one more token generated in the rows that count."""
        row_B = jnp.arange(token_B.shape[0])
        more_BZ = self.generated_BZ.at[row_B, token_B].add(counts_B.astype(jnp.int32))
        return self._replace(generated_BZ=more_BZ)


def sample(
    logits_BZ: jax.Array, choices: Choices, seen: Seen, count_B: jax.Array, num_tokens: int
) -> jax.Array:
    """Draws one token per row.

    A row's draw depends on its own scores and on its seed, number and count alone, so neither its
    neighbours nor the way there change it. The noise is added to the scores and the highest sum
    wins (the Gumbel-max trick): whoever has nearly the same scores draws nearly always the same.

    Args:
      count_B: how many tokens the row will have then; no two draws of a text have the same.
      num_tokens: ids from here on are never drawn; they pad the vocabulary.

    Returns:
      B int32.
    """
    scores_BZ = adjusted(logits_BZ, choices, seen, num_tokens)
    likeliest_B = jnp.argmax(scores_BZ, axis=-1)

    def draw() -> jax.Array:
        key_B = jax.vmap(_key)(choices.seed_B, choices.number_B, count_B)
        return jax.vmap(jax.random.categorical)(key_B, heated(scores_BZ, choices))

    any_drawn = jnp.any(choices.temperature_B > 0)
    drawn_B = jax.lax.cond(any_drawn, draw, lambda: likeliest_B)
    return jnp.where(choices.temperature_B > 0, drawn_B, likeliest_B).astype(jnp.int32)


def _key(seed: jax.Array, number: jax.Array, count: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), count)


def adjusted(logits_BZ: jax.Array, choices: Choices, seen: Seen, num_tokens: int) -> jax.Array:
    """Scores with penalties and biases; -inf for what pads the vocabulary."""
    legal_Z = jnp.arange(logits_BZ.shape[-1]) < num_tokens

    def adjust() -> jax.Array:
        count_BZ = seen.generated_BZ.astype(jnp.float32)
        was_seen_BZ = seen.in_prompt_BZ | (count_BZ > 0)
        repetition_B1 = choices.repetition_B[:, None]
        weakened_BZ = jnp.where(logits_BZ > 0, logits_BZ / repetition_B1, logits_BZ * repetition_B1)
        scores_BZ = jnp.where(was_seen_BZ, weakened_BZ, logits_BZ)
        scores_BZ -= choices.frequency_B[:, None] * count_BZ
        scores_BZ -= choices.presence_B[:, None] * jnp.minimum(count_BZ, 1)
        return scores_BZ + seen.bias_BZ

    penalized_B = (
        (choices.repetition_B != 1) | (choices.presence_B != 0) | (choices.frequency_B != 0)
    )
    is_adjusted = jnp.any(penalized_B | choices.is_biased_B)
    scores_BZ = jax.lax.cond(is_adjusted, adjust, lambda: logits_BZ)
    return jnp.where(legal_Z, scores_BZ, -jnp.inf)


def heated(scores_BZ: jax.Array, choices: Choices) -> jax.Array:
    """Scores whose softmax is drawn from: over the temperature, with what is left out at -inf."""
    heat_B1 = jnp.where(choices.temperature_B > 0, choices.temperature_B, 1.0)[:, None]
    # Below zero, and hidden after dividing: no temperature yields NaN or an illegal token.
    below_BZ = scores_BZ - jnp.max(scores_BZ, axis=-1, keepdims=True)
    heated_BZ = jnp.where(jnp.isfinite(scores_BZ), below_BZ / heat_B1, -jnp.inf)

    def leave_out() -> jax.Array:
        top_k_B = choices.top_k_B.astype(jnp.float32)
        kept_BZ = _best(heated_BZ, jnp.isfinite(heated_BZ).astype(jnp.float32), top_k_B)
        kept_BZ = jnp.where((top_k_B > 0)[:, None], kept_BZ, heated_BZ)
        best_BZ = _best(kept_BZ, jax.nn.softmax(kept_BZ, axis=-1), choices.top_p_B)
        kept_BZ = jnp.where((choices.top_p_B < 1)[:, None], best_BZ, kept_BZ)
        least_B1 = jnp.max(kept_BZ, axis=-1, keepdims=True) + jnp.log(choices.min_p_B)[:, None]
        return jnp.where(kept_BZ >= least_B1, kept_BZ, -jnp.inf)

    some_B = (choices.top_k_B > 0) | (choices.top_p_B < 1) | (choices.min_p_B > 0)
    return jax.lax.cond(jnp.any(some_B), leave_out, lambda: heated_BZ)


def _best(scores_BZ: jax.Array, weight_BZ: jax.Array, target_B: jax.Array) -> jax.Array:
    """The highest scores, as many as it takes for their weights to reach a target; others -inf.

    Equal scores stay or go together. The lowest score to stay is found bit by bit, which costs 32
    sums and no sorting of the vocabulary.
    """
    bits_BZ = jax.lax.bitcast_convert_type(scores_BZ, jnp.int32)
    # In the order of the scores: negative floats, whose bits grow with their size, turned around.
    order_BZ = jax.lax.bitcast_convert_type(
        jnp.where(bits_BZ < 0, ~bits_BZ, bits_BZ ^ jnp.int32(-(2**31))), jnp.uint32
    )

    def try_bit(least_B: jax.Array, bit: jax.Array) -> tuple[jax.Array, None]:
        raised_B = least_B | bit
        reached_B = jnp.sum(jnp.where(order_BZ >= raised_B[:, None], weight_BZ, 0), axis=-1)
        return jnp.where(reached_B >= target_B, raised_B, least_B), None

    bits = jnp.uint32(1) << jnp.arange(31, -1, -1, dtype=jnp.uint32)
    least_B, _ = jax.lax.scan(try_bit, jnp.zeros_like(order_BZ[:, 0]), bits)
    least_B = jnp.minimum(least_B, jnp.max(order_BZ, axis=-1))  # a target may round to 0
    return jnp.where(order_BZ >= least_B[:, None], scores_BZ, -jnp.inf)


class Likelihoods(NamedTuple):
    """How likely the model found the tokens that were drawn, and which it found likeliest."""

    logprob_B: jax.Array
    best_BM: jax.Array  # tokens, the likeliest first
    best_logprob_BM: jax.Array


def likelihoods(
    logits_BZ: jax.Array, token_B: jax.Array, wanted_B: jax.Array, num_tokens: int, most: int
) -> Likelihoods:
    """Log-probabilities by the bare scores; zeros if no row wants any."""
    legal_Z = jnp.arange(logits_BZ.shape[-1]) < num_tokens

    def compute() -> Likelihoods:
        logprobs_BZ = jax.nn.log_softmax(jnp.where(legal_Z, logits_BZ, -jnp.inf), axis=-1)
        best_logprob_BM, best_BM = jax.lax.top_k(logprobs_BZ, most)
        own_B1 = jnp.take_along_axis(logprobs_BZ, token_B[:, None], axis=-1)
        return Likelihoods(own_B1[:, 0], best_BM.astype(jnp.int32), best_logprob_BM)

    nothing_BM = jnp.zeros_like(logits_BZ[:, :most])
    nothing = Likelihoods(nothing_BM[:, 0], nothing_BM.astype(jnp.int32), nothing_BM)
    return jax.lax.cond(jnp.any(wanted_B), compute, lambda: nothing)
