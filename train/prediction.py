"""What the scores of tokens say of the tokens that follow."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from glm5_jax.collectives import BATCH, MODEL, alike, spread, total
from glm5_jax.linear import project, project_f32
from glm5_jax.model import Glm5
from glm5_jax.places import Places
from glm5_jax.queries import block_length, joined, map_queries, split
from glm5_jax.sharding import DECODE, Rules, whole
from glm5_jax.vocabulary import log_total, score_gradient, score_of, scores

Result = TypeVar("Result")

# With fewer tokens to a block, reading the head and adding to its gradient takes longer than
# multiplying.
_FEWEST_TOKENS = 256


class Sums(NamedTuple):
    """Of the tokens that are predicted, on all devices."""

    nats: jax.Array
    z: jax.Array  # squares of the log-sum-exp of the scores
    minimised: jax.Array  # nats + z_weight * z; the other two have no gradient


def next_token_sums(
    model: Glm5,
    hidden_BTD: jax.Array,
    tokens_BT: jax.Array,
    places: Places,
    distance: int,
    *,
    z_weight: float = 0.0,
    rules: Rules = DECODE,
) -> Sums:
    """The cross-entropy, in nats, of the tokens `distance` further on in their sequence.

    Args:
      z_weight: of `z` in what is minimised.
    """
    hidden_BTD = spread(hidden_BTD[:, :-distance], (MODEL,))
    head_ZD, hidden_BTD = alike(_head(model, rules), hidden_BTD)
    counted_BT = places.followed(distance)[:, :-distance]
    return total(_sums(z_weight, head_ZD, hidden_BTD, tokens_BT[:, distance:], counted_BT), BATCH)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(
    z_weight: float,
    head_ZD: jax.Array,
    hidden_BTD: jax.Array,
    tokens_BT: jax.Array,
    counted_BT: jax.Array,
) -> Sums:
    """The sums over this device's rows, of those tokens that count.

    Scores are neither kept nor computed again: the gradient, but for its factor, is found beside
    the sums, of a block of tokens at a time. That of the head is summed in float32 and kept in the
    head's dtype.

    Source: Liger Kernel, arXiv:2410.10989, section 3.2.
    """
    blocks = _blocks(head_ZD, hidden_BTD, tokens_BT, counted_BT)
    sums_G = jax.lax.map(lambda block: _block_sums(z_weight, head_ZD, *block)[0], blocks)
    return jax.tree.map(jnp.sum, sums_G)


_Gradient = tuple[jax.Array, jax.Array]  # of the head ZD and of the hidden states BTD


def _sums_forward(
    z_weight: float,
    head_ZD: jax.Array,
    hidden_BTD: jax.Array,
    tokens_BT: jax.Array,
    counted_BT: jax.Array,
) -> tuple[Sums, _Gradient]:
    def add_block(d_head_ZD: jax.Array, block: Any) -> tuple[jax.Array, tuple[Sums, jax.Array]]:
        sums, d_scores_BTZ = _block_sums(z_weight, head_ZD, *block)
        d_head_ZD += project_f32("BTZ,BTD->ZD", d_scores_BTZ, block[0])
        return d_head_ZD, (sums, project("BTZ,ZD->BTD", d_scores_BTZ, head_ZD))

    blocks = _blocks(head_ZD, hidden_BTD, tokens_BT, counted_BT)
    nothing_ZD = jnp.zeros_like(head_ZD, jnp.float32)
    d_head_ZD, (sums_G, d_hidden_GBTD) = jax.lax.scan(add_block, nothing_ZD, blocks)
    d_hidden_BTD = joined(d_hidden_GBTD, hidden_BTD.shape[1])
    return jax.tree.map(jnp.sum, sums_G), (d_head_ZD.astype(head_ZD.dtype), d_hidden_BTD)


def _blocks(head_ZD: jax.Array, *by_token: jax.Array) -> tuple[jax.Array, ...]:
    return split(by_token, _block_length(len(by_token[0]), head_ZD))


def _block_sums(
    z_weight: float,
    head_ZD: jax.Array,
    hidden_BTD: jax.Array,
    tokens_BT: jax.Array,
    counted_BT: jax.Array,
) -> tuple[Sums, jax.Array]:
    """The sums, and of what is minimised the gradient BTZ by scores."""
    scores_BTZ = scores(head_ZD, hidden_BTD)
    total_BT = log_total(scores_BTZ)
    nats_BT = total_BT - score_of(scores_BTZ, tokens_BT)
    z_BT = jnp.square(total_BT)
    by_token = Sums(nats_BT, z_BT, nats_BT + z_weight * z_BT)
    sums = jax.tree.map(lambda each_BT: jnp.sum(jnp.where(counted_BT, each_BT, 0)), by_token)
    d_nats_BT = counted_BT.astype(jnp.float32)
    d_total_BT = d_nats_BT * (1 + 2 * z_weight * total_BT)
    d_scores_BTZ = score_gradient(scores_BTZ, total_BT, tokens_BT, d_total_BT, -d_nats_BT)
    return sums, d_scores_BTZ.astype(hidden_BTD.dtype)


def _sums_backward(
    z_weight: float, gradient: _Gradient, d_sums: Sums
) -> tuple[jax.Array, jax.Array, None, None]:
    d_head_ZD, d_hidden_BTD = (
        (d_sums.minimised * each.astype(jnp.float32)).astype(each.dtype) for each in gradient
    )
    return d_head_ZD, d_hidden_BTD, None, None


_sums.defvjp(_sums_forward, _sums_backward)


def judged(
    model: Glm5,
    hidden_BTD: jax.Array,
    tokens_BT: jax.Array,
    distance: int,
    judge: Callable[[jax.Array, jax.Array], Result],
    rules: Rules,
) -> Result:
    """What a function finds of scores BTZ and the tokens `distance` further on, a block at a time.

    It is given all tokens but the last `distance` of each row, which have none so far on.
    """
    head_ZD = _head(model, rules)
    return map_queries(
        lambda hidden_BTD, tokens_BT: judge(scores(head_ZD, hidden_BTD), tokens_BT),
        _block_length(len(tokens_BT), head_ZD),
        hidden_BTD[:, :-distance],
        tokens_BT[:, distance:],
    )


def _head(model: Glm5, rules: Rules) -> jax.Array:
    return whole(model.head, Glm5(model.config).head, rules)


def _block_length(batch: int, head_ZD: jax.Array) -> int:
    """How many tokens of each row are to have their scores at once, and the scores' gradients."""
    return max(block_length(2 * 4 * batch * len(head_ZD)), -(-_FEWEST_TOKENS // batch))
