import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.bits import as_bits, from_bits
from glm5_jax.cache import KVCache, Pools, Rows
from glm5_jax.model import Glm5, for_decoding, forward, logits
from glm5_jax.params import abstract
from glm5_jax.presets import load_preset
from glm5_jax.slots import Slots
from tests.tiny import SHARED, TOKENS, random_model, tiny_config


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_rows_come_back_as_they_were_written(dtype):
    stack = jnp.zeros((3, 2, 9, 5), dtype)
    rows = Rows(as_bits(stack), jnp.int32(1), jnp.dtype(dtype))
    new = jax.random.normal(jax.random.key(0), (2, 4, 5)).astype(dtype)
    slots = jnp.array([[0, 3, 8, 2], [7, 9, 1, 9]])  # 9 lies outside the capacity
    written = rows.written(new, slots)
    everything = written.all()
    assert everything.dtype == dtype
    np.testing.assert_array_equal(everything[0, np.array([0, 3, 8, 2])], new[0])
    np.testing.assert_array_equal(everything[1, np.array([7, 1])], new[1, np.array([0, 2])])
    assert np.count_nonzero(np.any(np.asarray(everything) != 0, axis=-1)) == 6
    others = from_bits(written.stack_LYUA, dtype)[np.array([0, 2])]
    assert jnp.all(others == 0)
    picked = jnp.array([[[3, 0]], [[1, 7]]])
    np.testing.assert_array_equal(
        written.taken(picked), [[[new[0, 1], new[0, 0]]], [[new[1, 2], new[1, 0]]]]
    )


def test_only_layers_with_an_indexer_keep_index_keys():
    config = tiny_config(SHARED)
    cache = KVCache.create(config, 1, 10, jnp.float32)
    for segment, plan in zip(cache.pools.segments, config.segments, strict=True):
        for layer, kind in zip(segment, plan.unit, strict=True):
            assert (layer.index_keys_LYUJ is None) == (kind.indexer == "shared")


def test_places_of_new_tokens_follow_those_stored():
    cache = KVCache.create(tiny_config(), 2, 10, jnp.float32)
    cache = dataclasses.replace(cache, length_B=jnp.array([4, 0]))
    places = cache.next_places(jnp.array([2, 3]), 3)
    np.testing.assert_array_equal(places.position_BT, [[4, 5, 6], [0, 1, 2]])
    np.testing.assert_array_equal(places.real_BT, [[1, 1, 0], [1, 1, 1]])
    np.testing.assert_array_equal(cache.write_slots(places), [[4, 5, 10], [0, 1, 2]])
    np.testing.assert_array_equal(cache.grown(places, cache.pools.segments).length_B, [6, 3])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("capacity", "parts", "most"), [(65536, "cache experts", 0.5), (512, "layers", 1)]
)
def test_a_compiled_decode_step_copies_neither_the_cache_nor_weights(capacity, parts, most, dtype):
    """Copies of their size would make every step cost as much as the context or the model."""
    config = load_preset("bench").config
    model = jax.eval_shape(for_decoding, abstract(Glm5(config), dtype))
    cache = jax.eval_shape(lambda: KVCache.create(config, 1, capacity, dtype))

    def step(model, cache, token):
        return forward(model, token, cache.next_places(jnp.ones(1, jnp.int32), 1), cache)

    compiled = (
        jax.jit(step, donate_argnums=1)
        .lower(model, cache, jax.ShapeDtypeStruct((1, 1), jnp.int32))
        .compile()
    )

    def num_bytes(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    size = {
        "cache": num_bytes(cache.pools),
        "experts": num_bytes([segment.experts for segment in model.segments]),
        "layers": num_bytes([segment.layers for segment in model.segments]),
    }
    smallest = min(size[part] for part in parts.split())
    assert compiled.memory_analysis().temp_size_in_bytes < most * smallest


@pytest.mark.parametrize("misuse", ["another dtype", "teaching", "measuring"])
def test_misuse_of_a_cache_is_an_error_and_not_nonsense(misuse):
    config = tiny_config(SHARED)
    dtype = jnp.bfloat16 if misuse == "another dtype" else jnp.float32
    cache = KVCache.create(config, 1, 32, dtype)

    def read(model, tokens):
        places = cache.next_places(jnp.ones(1, jnp.int32), 1)
        options = {"teach_indexers": misuse == "teaching", "measure_recall": misuse == "measuring"}
        return forward(model, tokens, places, cache, **options)

    with pytest.raises(ValueError, match="cache"):
        jax.eval_shape(read, abstract(Glm5(config), jnp.float32), jnp.ones((1, 1), jnp.int32))


def test_pages_in_any_order_hold_what_one_piece_does():
    model = random_model(SHARED)
    tokens = jnp.array([TOKENS, TOKENS[::-1]])
    pools = Pools.create(model.config, 9, 8, jnp.float32, with_mtp=False)
    pools = jax.tree.map(lambda leaf: leaf + 7, pools)  # of sequences that were here before
    length, dtype = jnp.zeros(2, jnp.int32), jnp.dtype(jnp.float32)
    paged = KVCache(pools, length, dtype, jnp.array([[4, 0, 7, 9], [1, 8, 3, 9]]))
    whole = KVCache.create(model.config, 2, 32, jnp.float32)

    @jax.jit
    def read(cache, tokens, count):
        output = forward(model, tokens, cache.next_places(count, tokens.shape[1]), cache)
        return logits(model, output.hidden_BTD), output.cache

    for start, end in ((0, 13), (13, 14), (14, 24)):
        counts = jnp.array([end - start, min(end, 20) - min(start, 20)])
        one, whole = read(whole, tokens[:, start:end], counts)
        other, paged = read(paged, tokens[:, start:end], counts)
        for row, count in enumerate(counts):
            np.testing.assert_allclose(other[row, :count], one[row, :count], atol=1e-5)
    np.testing.assert_array_equal(paged.length_B, [24, 20])


def test_pages_that_others_see_are_not_written():
    model = random_model(SHARED)
    pools = Pools.create(model.config, 4, 8, jnp.float32, with_mtp=False)
    pages, length = jnp.array([[2, 0, 1]]), jnp.array([7])
    cache = KVCache(pools, length, jnp.dtype(jnp.float32), pages, writable_B=jnp.array([8]))
    places = cache.next_places(jnp.array([6]), 6)
    after = forward(model, jnp.array([TOKENS[:6]]), places, cache).cache
    for leaf in jax.tree.leaves(after.pools):
        assert not np.any(leaf[:, 2]) and not np.any(leaf[:, 1]) and not np.any(leaf[:, 3])
        assert np.all(np.any(leaf[:, 0, :5] != 0, axis=-1)) and not np.any(leaf[:, 0, 5:])


def test_slots_and_positions_undo_each_other():
    slots = Slots(page_part=4, num_pages=3)
    everything = jnp.arange(12)
    np.testing.assert_array_equal(slots.slot(slots.position(everything)), everything)
    np.testing.assert_array_equal(slots.slot(jnp.array([12, 13, 100])), [12, 12, 12])
    assert (slots.held, slots.everywhere, slots.are_divided) == (12, 12, False)
