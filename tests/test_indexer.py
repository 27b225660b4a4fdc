import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.cache import Rows
from glm5_jax.indexer import Indexer, index_scores, pages_of_block, taken_scores
from glm5_jax.places import Places
from glm5_jax.queries import map_queries
from glm5_jax.rope import rotation
from glm5_jax.selection import Selection
from tests.reference.numpy_glm5 import Layer
from tests.tiny import TINY, random_weights, tiny_config

B, T, I, J = 2, 20, 8, 16


def operands(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    query = jax.random.normal(keys[0], (B, T, I, J))
    key = jax.random.normal(keys[1], (B, T, J))
    return query, key, jax.random.normal(keys[2], (B, T, I))


def test_scores_are_the_gated_sum_of_rectified_products():
    query, key, gate = (np.asarray(a, np.float64) for a in operands())
    expected = np.zeros((B, T, T))
    for b in range(B):
        for t in range(T):
            for s in range(T):
                expected[b, t, s] = sum(
                    gate[b, t, i] * max(query[b, t, i] @ key[b, s], 0) for i in range(I)
                )
    np.testing.assert_allclose(index_scores(*operands()), expected, atol=1e-4)


def test_few_queries_score_as_many_do():
    query, key, gate = operands()
    many = index_scores(query, key, gate)
    few = index_scores(query[:, :3], key, gate[:, :3])
    np.testing.assert_allclose(few, many[:, :3], atol=1e-5)


def test_scores_of_keys_that_were_taken_are_those_of_all_keys():
    query, key, gate = operands()
    index = jax.random.randint(jax.random.key(7), (B, T, 5), 0, T)
    taken = key[jnp.arange(B)[:, None, None], index]
    expected = jnp.take_along_axis(index_scores(query, key, gate), index, axis=-1)
    np.testing.assert_allclose(taken_scores(query, taken, gate), expected, atol=1e-5)


def published_indexer(raw):
    """An indexer and the reference layer it belongs to, with the same weights."""
    weights = random_weights(raw)
    indexer = Indexer(tiny_config(raw))
    prefix = "model.layers.0.self_attn.indexer."
    indexer.query = jnp.asarray(weights[prefix + "wq_b.weight"]).reshape(I, J, -1)
    indexer.key = jnp.asarray(weights[prefix + "wk.weight"])
    indexer.key_scale = jnp.asarray(weights[prefix + "k_norm.weight"])
    indexer.key_bias = jnp.asarray(weights[prefix + "k_norm.bias"])
    indexer.head_gate = jnp.asarray(weights[prefix + "weights_proj.weight"])
    widened = {name: w.astype(np.float64) for name, w in weights.items()}
    return indexer, Layer(widened, "model.layers.0.", raw, full=True, moe=False)


@pytest.mark.parametrize("interleave", [True, False], ids=["glm", "deepseek-v3.2"])
def test_selection_is_that_of_the_reference(interleave):
    raw = TINY | {"indexer_rope_interleave": interleave}
    indexer, reference = published_indexer(raw)
    rng = np.random.default_rng(3)
    x = rng.standard_normal((T, raw["hidden_size"])).astype(np.float32)
    latent = rng.standard_normal((T, raw["q_lora_rank"])).astype(np.float32)
    expected = reference.index(
        list(x.astype(np.float64)), list(latent.astype(np.float64)), np.arange(T)
    )
    places = Places.unpadded(1, T)
    turn = rotation(places.position_BT, raw["qk_rope_head_dim"], 1e6)
    keys = Rows.of(indexer.keys(jnp.asarray(x)[None], turn))
    selection = indexer.select(
        jnp.asarray(x)[None], jnp.asarray(latent)[None], keys, turn, places, places
    )
    for t in range(T):
        index, valid = (np.asarray(a[0, t]) for a in selection[:2])
        np.testing.assert_array_equal(np.sort(index[valid]), expected[t])


def test_equal_scores_are_won_by_the_lowest_slot():
    indexer, _ = published_indexer(TINY)
    x = jnp.ones((1, T, TINY["hidden_size"]))
    latent = jnp.zeros((1, T, TINY["q_lora_rank"]))  # all scores are exactly zero
    places = Places.unpadded(1, T)
    turn = rotation(places.position_BT, TINY["qk_rope_head_dim"], 1e6)
    selection = indexer.select(x, latent, Rows.of(indexer.keys(x, turn)), turn, places, places)
    for t in range(T):
        index, valid = (np.asarray(a[0, t]) for a in selection[:2])
        np.testing.assert_array_equal(index[valid], np.arange(min(t + 1, 8)))


def test_a_short_context_needs_no_selection():
    indexer, _ = published_indexer(TINY)
    x = jnp.ones((1, 8, TINY["hidden_size"]))
    places = Places.unpadded(1, 8)
    turn = rotation(places.position_BT, TINY["qk_rope_head_dim"], 1e6)
    latent = jnp.ones((1, 8, TINY["q_lora_rank"]))
    keys = Rows.of(indexer.keys(x, turn))
    assert indexer.select(x, latent, keys, turn, places, places) == Selection()


def test_no_slot_is_seen_that_was_not_validly_selected():
    selection = Selection(
        jnp.array([[[3, 0, 5], [2, 4, 0]]]), jnp.array([[[1, 1, 0], [1, 0, 0]]], bool)
    )
    places = Places.unpadded(1, 6)
    np.testing.assert_array_equal(
        selection.seen(places, places), np.array([[[1, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0]]], bool)
    )


@pytest.mark.parametrize("length", [1, 3, 7, 20, 100])
def test_blocks_of_queries_give_what_all_queries_at_once_give(length):
    query, key, gate = operands()

    def score(query, gate):
        return index_scores(query, key, gate)

    whole = score(query, gate)
    np.testing.assert_allclose(map_queries(score, length, query, gate), whole, atol=1e-5)
    gradients = [
        jax.grad(lambda q, n=n: jnp.sum(jnp.sin(map_queries(score, n, q, gate))))(query)
        for n in (length, T)
    ]
    np.testing.assert_allclose(*gradients, atol=1e-4)


@pytest.mark.parametrize(("batch", "kib"), [(1, 1024), (2, 1024), (4, 2048), (8, 4096), (64, 4096)])
def test_pages_that_are_scored_at_a_time_fill_what_a_cache_holds(batch, kib):
    """Of pages of 16 KiB; where a row has fewer, all are."""
    assert batch * pages_of_block(batch, 2**12, 2**14) * 16 == kib
    assert pages_of_block(batch, 1, 2**14) == 1
