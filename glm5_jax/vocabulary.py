"""What is divided by vocabulary on a mesh: the embedding's rows, and the scores of tokens."""

import jax
import jax.numpy as jnp

from glm5_jax.collectives import MODEL, largest, shard_index, spread, total
from glm5_jax.linear import project_f32


def look_up(table_ZD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """The rows of tokens, BTD, from the devices that have them."""
    row_BT, is_here_BT = _places(tokens_BT, table_ZD.shape[0])
    x_BTD = jnp.where(is_here_BT[..., None], table_ZD[row_BT], 0)
    return total(x_BTD, (MODEL,))


def scores(head_ZD: jax.Array, hidden_BTD: jax.Array) -> jax.Array:
    """The scores of the next token, BTZ float32, of this device's share of the vocabulary."""
    return project_f32("BTD,ZD->BTZ", spread(hidden_BTD, (MODEL,)), head_ZD)


def cross_entropy(scores_BTZ: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """The nats BT of given tokens, from the shares of the vocabulary's scores."""
    return log_total(scores_BTZ) - score_of(scores_BTZ, tokens_BT)


def log_total(scores_BTZ: jax.Array) -> jax.Array:
    """The logarithm BT of the softmax's denominator, over all shares of the vocabulary."""
    peak_BT = largest(jnp.max(jax.lax.stop_gradient(scores_BTZ), axis=-1), (MODEL,))
    summed_BT = total(jnp.sum(jnp.exp(scores_BTZ - peak_BT[..., None]), axis=-1), (MODEL,))
    return jnp.log(summed_BT) + peak_BT


def score_of(scores_BTZ: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """The scores BT of given tokens, from the device that has each."""
    row_BT, is_here_BT = _places(tokens_BT, scores_BTZ.shape[-1])
    score_BT = jnp.take_along_axis(scores_BTZ, row_BT[..., None], axis=-1)[..., 0]
    return total(jnp.where(is_here_BT, score_BT, 0), (MODEL,))


def score_gradient(
    scores_BTZ: jax.Array,
    log_total_BT: jax.Array,
    tokens_BT: jax.Array,
    d_log_total_BT: jax.Array,
    d_score_BT: jax.Array,
) -> jax.Array:
    """The gradient BTZ of the scores, from those of `log_total` and `score_of`."""
    row_BT, is_here_BT = _places(tokens_BT, scores_BTZ.shape[-1])
    row_BT = jnp.where(is_here_BT, row_BT, -1)
    is_given_BTZ = jnp.arange(scores_BTZ.shape[-1]) == row_BT[..., None]
    share_BTZ = jnp.exp(scores_BTZ - log_total_BT[..., None])
    return share_BTZ * d_log_total_BT[..., None] + jnp.where(is_given_BTZ, d_score_BT[..., None], 0)


def likeliest(scores_BTZ: jax.Array) -> jax.Array:
    """The token BT with the highest score, the first of several, from shares of the vocabulary."""
    num_here = scores_BTZ.shape[-1]
    token_Z = jnp.arange(num_here, dtype=jnp.int32) + shard_index((MODEL,)) * num_here
    peak_BT = largest(jnp.max(scores_BTZ, axis=-1), (MODEL,))
    is_peak_BTZ = scores_BTZ == peak_BT[..., None]
    # Twice as fast on CPU as argmax.
    first_BT = jnp.min(jnp.where(is_peak_BTZ, token_Z, jnp.iinfo(jnp.int32).max), axis=-1)
    return -largest(-first_BT, (MODEL,))


def _places(tokens_BT: jax.Array, num_here: int) -> tuple[jax.Array, jax.Array]:
    """Where tokens stand in this device's share of the vocabulary, and which of them do."""
    row_BT = tokens_BT - shard_index((MODEL,)) * num_here
    is_here_BT = (row_BT >= 0) & (row_BT < num_here)
    return jnp.where(is_here_BT, row_BT, 0), is_here_BT
