"""The compiled steps of generating, on a mesh."""

import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from glm5_jax.cache import KVCache
from glm5_jax.collectives import BATCH, MODEL, published, share
from glm5_jax.config import Config
from glm5_jax.inference.sampling import sample
from glm5_jax.model import Glm5, forward, logits
from glm5_jax.sharding import Partition

_LOGITS: Any = PartitionSpec(BATCH, None)
_EQUAL = PartitionSpec()  # what every device is given whole


class State(NamedTuple):
    """What generating carries from step to step."""

    cache: KVCache
    logits_BZ: jax.Array  # float32, of the token after the last one read


class Read(Protocol):
    """Reads tokens."""

    def __call__(
        self, model: Glm5, state: State, tokens_BT: np.ndarray | jax.Array, count_B: np.ndarray
    ) -> State:
        """Reads the first `count_B` tokens of each row; the state given is used up."""


class Draw(Protocol):
    """Draws tokens."""

    def __call__(
        self,
        logits_BZ: jax.Array,
        temperature: np.float32,
        seed: np.uint32,
        number_B: np.ndarray,
        count: int,
    ) -> jax.Array:
        """The next token of each row, its `count`-th, by the seed and the number of its prompt."""


class Steps(NamedTuple):
    """The steps, for one config and partition."""

    read: Read
    draw: Draw


@functools.cache
def compiled_steps(
    config: Config, partition: Partition, dtype: jnp.dtype, num_tokens: int
) -> Steps:
    """The steps of a model.

    Args:
      dtype: of the cache.
      num_tokens: ids from here on are not drawn.
    """

    def read(model: Glm5, state: State, tokens_BT: jax.Array, count_B: jax.Array) -> State:
        tokens_BT, count_B = (share(each, BATCH, 0) for each in (tokens_BT, count_B))
        places = state.cache.next_places(count_B, tokens_BT.shape[1])
        output = forward(model, tokens_BT, places, state.cache, rules=partition.rules)
        assert output.cache is not None
        last_B11 = jnp.maximum(count_B - 1, 0)[:, None, None]
        hidden_B1D = jnp.take_along_axis(output.hidden_BTD, last_B11, axis=1)
        logits_BZ = published(logits(model, hidden_B1D, partition.rules)[:, 0], (MODEL,), 1)
        return State(output.cache, jnp.where(count_B[:, None] > 0, logits_BZ, state.logits_BZ))

    def draw(
        logits_BZ: jax.Array,
        temperature: jax.Array,
        seed: jax.Array,
        number_B: jax.Array,
        count: jax.Array,
    ) -> jax.Array:
        def key_of(number: jax.Array) -> jax.Array:
            return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), count)

        key_B = jax.vmap(key_of)(share(number_B, BATCH, 0))
        token_B = sample(logits_BZ, temperature, key_B, num_tokens)
        return published(token_B, BATCH, 0)

    on_shards = partition.on_shards
    state_specs = _state_specs(config, dtype)
    read_specs = (partition.specs(Glm5(config)), state_specs, _EQUAL, _EQUAL)
    draw_specs = (_LOGITS, _EQUAL, _EQUAL, _EQUAL, _EQUAL)
    return Steps(
        jax.jit(on_shards(read, read_specs, state_specs), donate_argnums=1),
        jax.jit(on_shards(draw, draw_specs, _EQUAL)),
    )


def _state_specs(config: Config, dtype: jax.typing.DTypeLike) -> State:
    """The mesh axes that divide the state."""
    return State(KVCache.specs(config, dtype), _LOGITS)


def empty_state(
    config: Config, partition: Partition, batch: int, capacity: int, dtype: jax.typing.DTypeLike
) -> State:
    """The state before anything is read."""
    create = functools.partial(_create, config, batch, capacity, dtype)
    return jax.jit(create, out_shardings=_shardings(config, partition, dtype))()


def abstract_state(
    config: Config, partition: Partition, batch: int, capacity: int, dtype: jax.typing.DTypeLike
) -> State:
    """Shapes, dtypes and shardings of the state."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(lambda: _create(config, batch, capacity, dtype)),
        _shardings(config, partition, dtype),
    )


def _create(config: Config, batch: int, capacity: int, dtype: jax.typing.DTypeLike) -> State:
    cache = KVCache.create(config, batch, capacity, dtype)
    return State(cache, jnp.zeros((batch, config.vocab_size), jnp.float32))


def _shardings(config: Config, partition: Partition, dtype: jax.typing.DTypeLike) -> Any:
    specs = _state_specs(config, dtype)
    return jax.tree.map(lambda spec: NamedSharding(partition.mesh, spec), specs)
