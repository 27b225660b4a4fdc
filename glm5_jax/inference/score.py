"""Scoring given tokens: logits, log-probabilities and predictions further ahead."""

import functools
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import PartitionSpec

from glm5_jax.collectives import BATCH, MODEL, share
from glm5_jax.config import Config
from glm5_jax.errors import InputError
from glm5_jax.mesh import fetch
from glm5_jax.model import Glm5, forward, logits, predict_ahead
from glm5_jax.places import Places
from glm5_jax.sharding import ROWS, Partition, on_one_device
from glm5_jax.vocabulary import cross_entropy


def check_tokens(tokens: np.ndarray, config: Config, depth: int, name: str) -> np.ndarray:
    """Returns tokens as int32 [B, T]; a single sequence may come without its batch axis.

    Raises:
      InputError: the array is not one of token ids, or too short or long to be scored.
    """
    if tokens.dtype.kind not in "iu" or tokens.ndim not in (1, 2):
        raise InputError(
            f"{name}: is {tokens.dtype} of shape {list(tokens.shape)}, expected integers [B, T]"
        )
    batch = np.atleast_2d(tokens)
    wrong = batch[(batch < 0) | (batch >= config.vocab_size)]
    if wrong.size:
        raise InputError(
            f"{name}: token {wrong[0]} is outside the vocabulary, expected 0 <= token < "
            f"{config.vocab_size}"
        )
    shortest = 1 + depth
    if batch.shape[0] == 0 or not shortest <= batch.shape[1] <= config.max_positions:
        raise InputError(
            f"{name}: has shape {list(tokens.shape)}, expected at least one sequence of "
            f"{shortest} to {config.max_positions} tokens"
        )
    return batch.astype(np.int32)


def check_depth(depth: int, config: Config) -> None:
    """Raises `InputError` if there is no MTP layer to predict further ahead with."""
    if depth and not config.num_mtp_layers:
        raise InputError(f"--mtp is {depth}, but the model has no MTP layer: expected 0")


def score(
    model: Glm5, tokens_BT: np.ndarray, depth: int = 0, partition: Partition | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Scores sequences: one after the other, or on a mesh as many at a time as divide a batch.

    Args:
      depth: how many tokens further ahead than the next the MTP layer predicts.
      partition: how the model lies on a mesh; on the first device unless given.

    Yields:
      For each sequence `logits` [T, Z], `logprobs` [T - 1] of each token given those before it,
      and for d from 1 to `depth` `mtp_logits_d` [T - d, Z], whose row i predicts token i + 1 + d;
      all float32.

    Raises:
      InputError: the model has no MTP layer to predict further ahead with.
    """
    check_depth(depth, model.config)
    partition = partition or on_one_device()
    model = partition.place(model, Glm5(model.config))
    compute = _compiled_score(model.config, partition, depth)
    together = partition.num_shards(BATCH)
    length = tokens_BT.shape[1]
    for first in range(0, len(tokens_BT), together):
        part_BT = tokens_BT[first : first + together]
        missing = together - len(part_BT)
        results = compute(model, np.pad(part_BT, ((0, missing), (0, 0))))
        logprobs_BT, next_BTZ, *ahead = map(fetch, results)
        for row in range(len(part_BT)):
            yield {
                "logits": next_BTZ[row],
                "logprobs": logprobs_BT[row],
                **{
                    f"mtp_logits_{d}": logits_BTZ[row, : length - d]
                    for d, logits_BTZ in enumerate(ahead, start=1)
                },
            }


@functools.cache
def _compiled_score(
    config: Config, partition: Partition, depth: int
) -> Callable[[Glm5, np.ndarray], list[jax.Array]]:
    rules = partition.rules

    def compute(model: Glm5, tokens_BT: jax.Array) -> list[jax.Array]:
        tokens_BT = share(tokens_BT, BATCH, 0)
        places = Places.unpadded(*tokens_BT.shape)
        hidden_BTD = forward(model, tokens_BT, places, rules=rules).hidden_BTD
        next_BTZ = logits(model, hidden_BTD, rules)
        given_BT = -cross_entropy(next_BTZ[:, :-1], tokens_BT[:, 1:])
        ahead = []
        if depth:
            ahead = predict_ahead(model, hidden_BTD, tokens_BT, places, depth, rules=rules)
        return [given_BT, next_BTZ, *(logits(model, hidden, rules) for hidden, _ in ahead)]

    in_specs = (partition.specs(Glm5(config)), PartitionSpec())
    scores = PartitionSpec(BATCH, None, MODEL)
    out_specs = [ROWS, *[scores] * (1 + depth)]
    return jax.jit(partition.on_shards(compute, in_specs, out_specs))
