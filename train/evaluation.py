"""What a model makes of held-out text."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from glm5_jax.block import Report
from glm5_jax.collectives import BATCH, MESH_AXES, share, total
from glm5_jax.config import Config
from glm5_jax.model import Glm5, forward, predict_ahead
from glm5_jax.params import leaves_by_path
from glm5_jax.places import Places
from glm5_jax.selection import Recall
from glm5_jax.sharding import Partition, Rules
from glm5_jax.vocabulary import cross_entropy, likeliest
from train.data import Batch, Data
from train.loss import Objective, by_layer
from train.optimizer import Params
from train.prediction import judged
from train.settings import Settings
from train.state import assemble


class Evaluation:
    """Scores rows of the held-out text."""

    def __init__(
        self,
        data: Data,
        config: Config,
        objective: Objective,
        settings: Settings,
        partition: Partition,
    ):
        """Takes `eval_rows` rows, spread over all there are, or as many as there are.

        Raises:
          InputError: there is not one.
        """
        self._rows = data.split("held_out", settings.length, at_least=1)
        count = min(settings.eval_rows, self._rows.num_rows)
        self._numbers = [number * self._rows.num_rows // count for number in range(count)]
        self._batch_size = settings.batch_size // settings.microbatches
        self._bytes_per_token = data.bytes_per_token("held_out")
        self._evaluate = make_evaluate(config, objective, partition, settings.dtype)

    def __call__(self, params: Params) -> dict[str, Any]:
        """What `measured` gives, and bits per byte of text, which no tokenizer changes."""
        numbers = measured(self._evaluate(params, *batch) for batch in self._batches())
        bits = numbers["held_out_loss"] / math.log(2) / self._bytes_per_token
        return numbers | {"bits_per_byte": bits}

    def _batches(self) -> Iterator[Batch]:
        """The rows, and rows of padding that fill up the last batch: one shape, compiled once."""
        for first in range(0, len(self._numbers), self._batch_size):
            batch = self._rows.rows(self._numbers[first : first + self._batch_size])
            missing = self._batch_size - len(batch.tokens_BT)
            yield Batch(*(np.pad(part_BT, ((0, missing), (0, 0))) for part_BT in batch))


class Sums(NamedTuple):
    """Over the tokens of a batch, on all devices."""

    nats: list[jax.Array]  # of the next token, then by depth of MTP
    num_tokens: list[jax.Array]  # that these are of
    accepted: list[jax.Array]  # by depth: from how many of them that many drafts are right
    loads: list[jax.Array]  # E, by layer with experts
    recalls: list[Recall]  # by layer


def measured(batches: Iterable[Sums]) -> dict[str, Any]:
    """The numbers of a record, of the model as it attends in the stage.

    Returns:
      held_out_loss: nats per token.
      held_out_mtp_losses: by depth, nats per token.
      mtp_acceptance: by depth, the share of the tokens of that loss from which so many can be
        drafted that are all the model's own choice: the likeliest token of each depth up to this
        one is the likeliest of the main model there. At every depth both read the text, where a
        drafting model reads its drafts.
      index_recall: by layer, and then of the MTP layer over all its depths, how much of the
        attention to all visible tokens those get that the indexer which serves the layer selects:
        the mean over heads, and over queries that see more tokens than are selected. Empty where
        none do.
      expert_loads: by layer with experts, and then of the MTP layer over all its depths, each
        expert's share of what the tokens chose.
    """
    on_host = map(jax.device_get, batches)
    sums = jax.tree.map(lambda *parts: np.sum(parts, axis=0, dtype=np.float64), *on_host)
    loss, *ahead = map(_mean, sums.nats, sums.num_tokens)
    return {
        "held_out_loss": loss,
        "held_out_mtp_losses": ahead,
        "mtp_acceptance": list(map(_mean, sums.accepted, sums.num_tokens[1:])),
        "index_recall": [_mean(*each) for each in sums.recalls if each.num_queries],
        "expert_loads": [(load_E / max(1, sum(load_E))).round(5).tolist() for load_E in sums.loads],
    }


def _mean(summed: Any, count: Any) -> float:
    """Of nothing it is 0, as in training."""
    return float(summed / max(1, count))


def make_evaluate(
    config: Config, objective: Objective, partition: Partition, dtype: str
) -> Callable[[Params, np.ndarray, np.ndarray], Sums]:
    """Compiles `evaluate(params, tokens_BT, segment_BT)`."""
    options: dict[str, Any] = {
        "rules": partition.rules,
        "attend_to_all": objective.attends_to_all,
        "measure_recall": True,
    }

    def evaluate(params: Params, tokens_BT: jax.Array, segment_BT: jax.Array) -> Sums:
        tokens_BT, segment_BT = (share(each, BATCH, 0) for each in (tokens_BT, segment_BT))
        model, places = assemble(config, params, dtype), Places.packed(segment_BT)
        output = forward(model, tokens_BT, places, observe=_seen, **options)
        ahead = []
        if depth := objective.mtp_depth:
            ahead = predict_ahead(model, output.hidden_BTD, tokens_BT, places, depth, **options)
        seen = by_layer(config, output.observed)
        if ahead:
            by_depth = [_seen(report) for _, report in ahead]
            seen.append(jax.tree.map(lambda *parts: sum(parts), *by_depth))
        loads = [load_E for load_E, _ in seen if load_E is not None]
        recalls = [recall for _, recall in seen if recall is not None]
        hiddens = [output.hidden_BTD, *(hidden_BTD for hidden_BTD, _ in ahead)]
        predicted = _predicted(model, hiddens, tokens_BT, places, partition.rules)
        return Sums(*predicted, total(loads, BATCH), total(recalls, MESH_AXES))

    specs, equal = leaves_by_path(partition.specs(Glm5(config))), PartitionSpec()
    return jax.jit(partition.on_shards(evaluate, (specs, equal, equal), equal))


def _seen(report: Report) -> tuple[jax.Array | None, Recall | None]:
    return report.load_E, report.recall


def _predicted(
    model: Glm5, hiddens: list[jax.Array], tokens_BT: jax.Array, places: Places, rules: Rules
) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
    """The nats, tokens and accepted drafts of `Sums`.

    Row i of depth d drafts the token after token i + d, of which row i + d of the main model is.
    """

    def judge(scores_BTZ: jax.Array, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        return cross_entropy(scores_BTZ, tokens_BT), likeliest(scores_BTZ)

    nats, num_tokens, accepted = [], [], []
    for distance, hidden_BTD in enumerate(hiddens, start=1):
        nats_BT, token_BT = judged(model, hidden_BTD, tokens_BT, distance, judge, rules)
        counted_BT = places.followed(distance)[:, :-distance]
        nats.append(total(jnp.sum(jnp.where(counted_BT, nats_BT, 0)), BATCH))
        num_tokens.append(total(jnp.sum(counted_BT), BATCH))
        if distance == 1:
            own_BT = token_BT
            agreed_BT = jnp.ones_like(counted_BT)
        else:
            agreed_BT = agreed_BT[:, :-1] & (token_BT == own_BT[:, distance - 1 :])
            accepted.append(total(jnp.sum(agreed_BT & counted_BT), BATCH))
    return nats, num_tokens, accepted
