"""The key-value cache: what the model remembers of earlier tokens.

Each layer keeps one row per token, its normalised latent followed by its rotated key, and layers
with an indexer also keep the token's index key. Rows lie in pages: which ones a sequence has is
said by a table, so that memory follows what is used and sequences that begin alike share pages.
A token's slot in the pages of its sequence is its position, so padding is never stored and one
compiled step serves every length. On a mesh every page is divided over `model`: latents have no
heads to divide.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from glm5_jax.bits import as_bits, from_bits
from glm5_jax.collectives import BATCH, MODEL, Axes
from glm5_jax.config import Config
from glm5_jax.layers import LayerKind
from glm5_jax.places import Places
from glm5_jax.slots import Slots


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """One layer's rows, in the stack of all layers of its segment slot.

    The stack is indexed by layer, page and slot together and updated in place: taking the layer
    out first would copy the whole layer at every step.
    """

    stack_LYUA: jax.Array
    layer: jax.Array
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})
    axes: Axes = dataclasses.field(default=(), metadata={"static": True})  # that divide the pages
    page_BW: jax.Array | None = None  # int32, each sequence's pages; None: one, of its own number

    @classmethod
    def of(cls, rows_BSA: jax.Array) -> "Rows":
        """Rows of a pass without a cache: the tokens at hand are all there is to see."""
        return cls(rows_BSA[None], jnp.zeros((), jnp.int32), rows_BSA.dtype)

    @property
    def slots(self) -> Slots:
        """How the rows of a sequence lie here."""
        num_pages = 1 if self.page_BW is None else self.page_BW.shape[1]
        return Slots(self.stack_LYUA.shape[2], num_pages, self.axes)

    def written(self, rows_BTA: jax.Array, slot_BT: jax.Array) -> "Rows":
        """With new rows at their slots; a slot that is not held here is not stored."""
        page_BT, within_BT = self._find(slot_BT)
        stack_LYUA = self.stack_LYUA.at[self.layer, page_BT, within_BT].set(
            as_bits(rows_BTA), mode="drop"
        )
        return dataclasses.replace(self, stack_LYUA=stack_LYUA)

    def all(self) -> jax.Array:
        """Every row of the sequences that is held here, BSA."""
        if self.page_BW is None:
            return from_bits(self.stack_LYUA[self.layer], self.dtype)
        rows_BWUA = self.stack_LYUA.at[self.layer, self.page_BW].get(mode="clip")
        batch, pages, part, width = rows_BWUA.shape
        return from_bits(rows_BWUA.reshape(batch, pages * part, width), self.dtype)

    def taken(self, index_BTK: jax.Array) -> jax.Array:
        """The rows at the given slots of those held here, BTKA; others give some row."""
        page_BTK, within_BTK = self._find(index_BTK)
        rows_BTKA = self.stack_LYUA.at[self.layer, page_BTK, within_BTK].get(mode="clip")
        return from_bits(rows_BTKA, self.dtype)

    def _find(self, slot: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The page of the pool, and the place in it, of slots [B, ...]; outside if not held."""
        batch = jnp.arange(slot.shape[0]).reshape(-1, *[1] * (slot.ndim - 1))
        if self.page_BW is None:
            return jnp.broadcast_to(batch, slot.shape), slot
        number, within = jnp.divmod(slot, self.slots.page_part)
        nowhere = self.stack_LYUA.shape[1]
        return self.page_BW.at[batch, number].get(mode="fill", fill_value=nowhere), within


class LayerCache(NamedTuple):
    """The stacks of one segment slot; index keys only where its layers have an indexer."""

    rows_LYUA: jax.Array
    index_keys_LYUJ: jax.Array | None

    @classmethod
    def create(
        cls, kind: LayerKind, config: Config, shape: tuple[int, int, int], dtype: Any
    ) -> "LayerCache":
        """Empty stacks; the shape is that of layers, pages and the slots of a page."""
        width = config.indexer.head_dim
        keys = jnp.zeros((*shape, width), dtype) if kind.indexer == "full" else None
        return cls(jnp.zeros((*shape, config.mla.row_dim), dtype), keys)

    def memory(
        self, layer: jax.Array, dtype: jnp.dtype, page_BW: jax.Array | None
    ) -> tuple[Rows, Rows | None]:
        """The rows and the index keys of one layer."""
        rows = Rows(self.rows_LYUA, layer, dtype, (MODEL,), page_BW)
        if self.index_keys_LYUJ is None:
            return rows, None
        return rows, Rows(self.index_keys_LYUJ, layer, dtype, (MODEL,), page_BW)


class Pools(NamedTuple):
    """The pages of all layers, by segment and slot, and of the MTP layer where it is kept."""

    segments: tuple[tuple[LayerCache, ...], ...]
    mtp: LayerCache | None

    @classmethod
    def create(
        cls, config: Config, num_pages: int, page_size: int, dtype: Any, *, with_mtp: bool
    ) -> "Pools":
        """Empty pages of `page_size` slots."""
        stored = jnp.uint16 if jnp.dtype(dtype).itemsize == 2 else dtype
        segments = tuple(
            tuple(
                LayerCache.create(kind, config, (plan.count, num_pages, page_size), stored)
                for kind in plan.unit
            )
            for plan in config.segments
        )
        mtp = None
        if with_mtp:
            mtp = LayerCache.create(config.mtp_kind, config, (1, num_pages, page_size), stored)
        return cls(segments, mtp)

    @classmethod
    def specs(cls, config: Config, *, with_mtp: bool) -> Any:
        """The mesh axes that divide each array: pages by the batch's, their slots by `model`."""
        pools = jax.eval_shape(lambda: cls.create(config, 1, 1, jnp.float32, with_mtp=with_mtp))
        return jax.tree.map(lambda _: PartitionSpec(None, BATCH, MODEL, None), pools)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The whole model's cache. Pass it in, donate it, use the returned one."""

    pools: Pools
    length_B: jax.Array  # int32: tokens stored of each row
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})
    page_BW: jax.Array | None = None  # int32, each row's pages; None: one, of its own number
    # int32: positions from which on new tokens are stored; those before lie in pages that other
    # sequences see too.
    writable_B: jax.Array | None = None

    @classmethod
    def create(
        cls, config: Config, batch: int, capacity: int, dtype: jax.typing.DTypeLike
    ) -> "KVCache":
        """An empty cache for `batch` sequences of up to `capacity` tokens, a page for each."""
        pools = Pools.create(config, batch, capacity, dtype, with_mtp=False)
        return cls(pools, jnp.zeros((batch,), jnp.int32), jnp.dtype(dtype))

    @classmethod
    def specs(cls, config: Config, dtype: jax.typing.DTypeLike) -> Any:
        """The mesh axes that divide each array of what `create` gives."""
        rows: Any = PartitionSpec(BATCH)
        return cls(Pools.specs(config, with_mtp=False), rows, jnp.dtype(dtype))

    @property
    def slots(self) -> Slots:
        """How the slots of a row lie here."""
        num_pages = 1 if self.page_BW is None else self.page_BW.shape[1]
        return Slots(self.pools.segments[0][0].rows_LYUA.shape[2], num_pages, (MODEL,))

    def next_places(self, count_B: jax.Array, length: int) -> Places:
        """The places of new tokens: the first `count_B` of each row's `length`, then padding."""
        index_T = jnp.arange(length, dtype=jnp.int32)
        real_BT = index_T < count_B[:, None]
        return Places(self.length_B[:, None] + index_T, real_BT.astype(jnp.int32))

    def key_places(self) -> Places:
        """The places of the slots held here. Slots not yet filled lie after every query."""
        places = Places.unpadded(self.length_B.shape[0], self.slots.held)
        return Places(self.slots.position(places.position_BT), places.segment_BT)

    def write_slots(self, places: Places) -> jax.Array:
        """Where the rows of new tokens go: BT, the number of slots for those not stored here."""
        is_new_BT = places.real_BT
        if self.writable_B is not None:
            is_new_BT &= places.position_BT >= self.writable_B[:, None]
        return jnp.where(is_new_BT, self.slots.slot(places.position_BT), self.slots.held)

    def grown(self, places: Places, segments: tuple[tuple[LayerCache, ...], ...]) -> "KVCache":
        """The cache once the tokens at `places` are stored, as the given segments have them."""
        end_BT = jnp.where(places.real_BT, places.position_BT + 1, 0)
        length_B = jnp.maximum(self.length_B, jnp.max(end_BT, axis=1))
        pools = self.pools._replace(segments=segments)
        return dataclasses.replace(self, pools=pools, length_B=length_B)
