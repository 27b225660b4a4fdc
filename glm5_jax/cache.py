"""The key-value cache: what the model remembers of earlier tokens.

Each layer keeps one row per token, its normalised latent followed by its rotated key, and layers
with an indexer also keep the token's index key. A token's slot is its position, so padding is
never stored and one compiled step serves every length up to the capacity. On a mesh the slots of
a sequence are divided over `model`, in order: latents have no heads to divide.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from glm5_jax.bits import as_bits, from_bits
from glm5_jax.collectives import BATCH, MODEL, Axes, num_shards, shard_index
from glm5_jax.config import Config
from glm5_jax.places import Places


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """One layer's rows, in the stack of all layers of its segment slot.

    The stack is indexed by layer and token together and updated in place: taking the layer out
    first would copy the whole layer at every step.
    """

    stack_LBSA: jax.Array
    layer: jax.Array
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})
    axes: Axes = dataclasses.field(default=(), metadata={"static": True})  # that divide the slots

    @classmethod
    def of(cls, rows_BSA: jax.Array) -> "Rows":
        """Rows of a pass without a cache: the tokens at hand are all there is to see."""
        return cls(rows_BSA[None], jnp.zeros((), jnp.int32), rows_BSA.dtype)

    @property
    def num_slots(self) -> int:
        """Number of slots held here, S."""
        return self.stack_LBSA.shape[2]

    @property
    def all_slots(self) -> int:
        """Number of keys a query can see, here and on other shards."""
        return self.num_slots * num_shards(self.axes)

    @property
    def are_divided(self) -> bool:
        """Whether other shards hold slots too."""
        return num_shards(self.axes) > 1

    @property
    def first_slot(self) -> jax.Array:
        """The first of the slots held here."""
        return shard_index(self.axes) * self.num_slots

    def written(self, rows_BTA: jax.Array, slot_BT: jax.Array) -> "Rows":
        """With new rows at their slots; a slot outside the capacity is not stored."""
        batch_B1 = jnp.arange(rows_BTA.shape[0])[:, None]
        stack_LBSA = self.stack_LBSA.at[self.layer, batch_B1, slot_BT].set(
            as_bits(rows_BTA), mode="drop"
        )
        return dataclasses.replace(self, stack_LBSA=stack_LBSA)

    def all(self) -> jax.Array:
        """Every row held here, BSA."""
        return from_bits(self.stack_LBSA[self.layer], self.dtype)

    def taken(self, index_BTK: jax.Array) -> jax.Array:
        """The rows at the given slots of those held here, BTKA; others give some row."""
        batch_B11 = jnp.arange(index_BTK.shape[0])[:, None, None]
        rows_BTKA = self.stack_LBSA.at[self.layer, batch_B11, index_BTK].get(mode="clip")
        return from_bits(rows_BTKA, self.dtype)


class LayerCache(NamedTuple):
    """The stacks of one segment slot; index keys only where its layers have an indexer."""

    rows_LBSA: jax.Array
    index_keys_LBSJ: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The whole model's cache, by segment and slot. Pass it in, donate it, use the returned one."""

    segments: tuple[tuple[LayerCache, ...], ...]
    length_B: jax.Array  # int32: tokens stored of each row
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})

    @classmethod
    def create(
        cls, config: Config, batch: int, capacity: int, dtype: jax.typing.DTypeLike
    ) -> "KVCache":
        """An empty cache for `batch` sequences of up to `capacity` tokens."""
        stored = jnp.uint16 if jnp.dtype(dtype).itemsize == 2 else dtype

        def stack(layers: int, width: int) -> jax.Array:
            return jnp.zeros((layers, batch, capacity, width), stored)

        segments = tuple(
            tuple(
                LayerCache(
                    stack(segment.count, config.mla.row_dim),
                    stack(segment.count, config.indexer.head_dim)
                    if kind.indexer == "full"
                    else None,
                )
                for kind in segment.unit
            )
            for segment in config.segments
        )
        return cls(segments, jnp.zeros((batch,), jnp.int32), jnp.dtype(dtype))

    @classmethod
    def specs(cls, config: Config, dtype: jax.typing.DTypeLike) -> Any:
        """The mesh axes that divide each array: rows of the batch, and slots over `model`."""
        stack = PartitionSpec(None, BATCH, MODEL, None)
        shapes = jax.eval_shape(lambda: cls.create(config, 1, 1, dtype))
        segments = jax.tree.map(lambda _: stack, shapes.segments)
        return dataclasses.replace(shapes, segments=segments, length_B=PartitionSpec(BATCH))

    @property
    def num_slots(self) -> int:
        """Slots per sequence that are held here."""
        return self.segments[0][0].rows_LBSA.shape[2]

    @property
    def _first_slot(self) -> jax.Array:
        return shard_index((MODEL,)) * self.num_slots

    def next_places(self, count_B: jax.Array, length: int) -> Places:
        """The places of new tokens: the first `count_B` of each row's `length`, then padding."""
        index_T = jnp.arange(length, dtype=jnp.int32)
        real_BT = index_T < count_B[:, None]
        return Places(self.length_B[:, None] + index_T, real_BT.astype(jnp.int32))

    def key_places(self) -> Places:
        """The places of the slots held here. Slots not yet filled lie after every query."""
        places = Places.unpadded(self.length_B.shape[0], self.num_slots)
        return Places(places.position_BT + self._first_slot, places.segment_BT)

    def slots(self, places: Places) -> jax.Array:
        """Where the rows of new tokens go: BT, the number of slots for those not stored here."""
        slot_BT = places.position_BT - self._first_slot
        is_here_BT = places.real_BT & (slot_BT >= 0)
        return jnp.where(is_here_BT, slot_BT, self.num_slots)

    def grown(self, places: Places) -> jax.Array:
        """The lengths once the tokens at `places` are stored."""
        end_BT = jnp.where(places.real_BT, places.position_BT + 1, 0)
        return jnp.maximum(self.length_B, jnp.max(end_BT, axis=1))
