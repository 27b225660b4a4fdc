"""The loss of held-out text."""

import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from glm5_jax.collectives import BATCH, share, total
from glm5_jax.config import Config
from glm5_jax.model import Glm5, forward
from glm5_jax.params import leaves_by_path
from glm5_jax.places import Places
from glm5_jax.sharding import Partition
from train.data import Batch, Data
from train.loss import next_token_sums
from train.optimizer import Params
from train.settings import Settings
from train.state import assemble


class Evaluation:
    """Scores the first rows of the held-out text."""

    def __init__(self, data: Data, config: Config, settings: Settings, partition: Partition):
        """Takes `eval_rows` rows, or as many as there are.

        Raises:
          InputError: there is not one.
        """
        self._rows = data.split("held_out", settings.length, at_least=1)
        self._num_rows = min(settings.eval_rows, self._rows.num_rows)
        self._batch_size = settings.batch_size // settings.microbatches
        self._bytes_per_token = data.bytes_per_token("held_out")
        self._evaluate = _make_evaluate(config, partition, settings.dtype)

    def __call__(self, params: Params) -> dict[str, float]:
        """Nats per token, and bits per byte of text, which no tokenizer changes."""
        sums = [jax.device_get(self._evaluate(params, *batch)) for batch in self._batches()]
        nats, counts = zip(*sums, strict=True)
        loss = float(np.sum(nats, dtype=np.float64) / np.sum(counts))
        bits = loss / math.log(2) / self._bytes_per_token
        return {"held_out_loss": loss, "bits_per_byte": bits}

    def _batches(self) -> Iterator[Batch]:
        """The rows, and rows of padding that fill up the last batch: one shape, compiled once."""
        for first in range(0, self._num_rows, self._batch_size):
            batch = self._rows.rows(range(first, min(first + self._batch_size, self._num_rows)))
            missing = self._batch_size - len(batch.tokens_BT)
            yield Batch(*(np.pad(part_BT, ((0, missing), (0, 0))) for part_BT in batch))


def _make_evaluate(
    config: Config, partition: Partition, dtype: str
) -> Callable[[Params, np.ndarray, np.ndarray], tuple[jax.Array, jax.Array]]:
    """Compiles `evaluate(params, tokens_BT, segment_BT)`: nats, and of how many tokens."""
    rules = partition.rules

    def evaluate(
        params: Params, tokens_BT: jax.Array, segment_BT: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        tokens_BT, segment_BT = (share(each, BATCH, 0) for each in (tokens_BT, segment_BT))
        model, places = assemble(config, params, dtype), Places.packed(segment_BT)
        hidden_BTD = forward(model, tokens_BT, places, rules=rules).hidden_BTD
        nats = next_token_sums(model, hidden_BTD, tokens_BT, places, 1, rules).nats
        return nats, total(jnp.sum(places.followed(1)), BATCH)

    specs, equal = leaves_by_path(partition.specs(Glm5(config))), PartitionSpec()
    return jax.jit(partition.on_shards(evaluate, (specs, equal, equal), equal))
