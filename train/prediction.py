"""What the scores of tokens say of the tokens that follow."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from glm5_jax.collectives import BATCH, total
from glm5_jax.model import Glm5
from glm5_jax.places import Places
from glm5_jax.queries import map_queries
from glm5_jax.sharding import DECODE, Rules, whole
from glm5_jax.vocabulary import log_total, score_of, scores

Result = TypeVar("Result")

# What the scores of a block of tokens may take: large, for every block reads the whole head.
_BLOCK_BYTES = 256 * 2**20


class Sums(NamedTuple):
    """Of the tokens that are predicted, on all devices."""

    nats: jax.Array
    z: jax.Array  # squares of the log-sum-exp of the scores


def next_token_sums(
    model: Glm5,
    hidden_BTD: jax.Array,
    tokens_BT: jax.Array,
    places: Places,
    distance: int,
    rules: Rules = DECODE,
) -> Sums:
    """The cross-entropy, in nats, of the tokens `distance` further on in their sequence."""

    def sums_of(scores_BTZ: jax.Array, tokens_BT: jax.Array) -> Sums:
        total_BT = log_total(scores_BTZ)
        return Sums(total_BT - score_of(scores_BTZ, tokens_BT), jnp.square(total_BT))

    by_token = judged(model, hidden_BTD, tokens_BT, distance, sums_of, rules)
    counted_BT = places.followed(distance)[:, :-distance]
    return jax.tree.map(
        lambda each_BT: total(jnp.sum(jnp.where(counted_BT, each_BT, 0)), BATCH), by_token
    )


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
    head_ZD = whole(model.head, Glm5(model.config).head, rules)
    length = max(1, _BLOCK_BYTES // (2 * 4 * tokens_BT.shape[0] * head_ZD.shape[0]))
    return map_queries(
        lambda hidden_BTD, tokens_BT: judge(scores(head_ZD, hidden_BTD), tokens_BT),
        length,
        hidden_BTD[:, :-distance],
        tokens_BT[:, distance:],
    )
