import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.attention import (
    Attention,
    cheapest_form,
    expanded_attention,
    latent_attention,
)
from glm5_jax.cache import Rows
from glm5_jax.gathered import gathered_attention
from glm5_jax.params import initialize
from glm5_jax.places import Places, visible
from glm5_jax.presets import load_preset
from glm5_jax.rope import rotation
from glm5_jax.selection import Selection
from tests.tiny import TINY, tiny_config

CONFIG = tiny_config(TINY)
B, T, K = 2, 20, 8


def inputs(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    attention = initialize(Attention(CONFIG), keys[0], std=0.2)
    x = jax.random.normal(keys[1], (B, T, CONFIG.dim))
    places = Places.packed(jnp.array([[1] * T, [1] * 12 + [2] * 5 + [0] * 3]))
    turn = rotation(places.position_BT, CONFIG.mla.rope_dim, 1e4)
    queries = attention.queries(attention.query_latent(x), turn)
    rows = Rows.of(attention.rows(x, turn))
    scores = jnp.where(visible(places, places), jax.random.normal(keys[2], (B, T, T)), -jnp.inf)
    highest, index = jax.lax.top_k(scores, K)
    return attention, queries, rows, places, Selection(index, highest > -jnp.inf)


def attend(form, attention, queries, rows, places, selection, key_places=None):
    """Attends in a given form, whichever the shapes would choose."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glm5_jax.attention.cheapest_form", lambda *_: form)
        key_places = key_places or places
        return attention.attend(queries, rows, places, key_places, selection, with_mass=True)


@pytest.mark.parametrize("form", ["absorbed", "gathered"])
def test_all_forms_of_attention_agree_on_selected_tokens(form):
    attention, *given = inputs()
    real = np.asarray(given[2].real_BT)
    expected, expected_mass = attend("expanded", attention, *given)
    actual, mass = attend(form, attention, *given)
    np.testing.assert_allclose(np.asarray(actual)[real], np.asarray(expected)[real], atol=2e-5)
    np.testing.assert_allclose(np.asarray(mass)[real], np.asarray(expected_mass)[real], atol=1e-5)
    np.testing.assert_allclose(np.asarray(mass)[real].sum(axis=-1), 4, rtol=1e-5)


def test_absorbed_equals_expanded_on_all_visible_tokens():
    attention, queries, rows, places, _ = inputs()
    real = np.asarray(places.real_BT)
    (expected, expected_mass), (actual, mass) = (
        attend(form, attention, queries, rows, places, Selection())
        for form in ("expanded", "absorbed")
    )
    np.testing.assert_allclose(np.asarray(actual)[real], np.asarray(expected)[real], atol=2e-5)
    np.testing.assert_allclose(np.asarray(mass)[real], np.asarray(expected_mass)[real], atol=1e-5)


@pytest.mark.parametrize("form", ["absorbed", "gathered"])
def test_gradients_agree_too(form):
    attention, queries, rows, places, selection = inputs()
    weights = jax.random.normal(jax.random.key(5), (B, T, CONFIG.dim))
    weights = jnp.where(places.real_BT[..., None], weights, 0)

    def loss(attention, queries, stack, form):
        own_rows = Rows(stack, rows.layer, rows.dtype)
        out, _ = attend(form, attention, queries, own_rows, places, selection)
        return jnp.sum(weights * out)

    gradient = jax.grad(loss, argnums=(0, 1, 2))
    actual = gradient(attention, queries, rows.stack_LYUA, form)
    expected = gradient(attention, queries, rows.stack_LYUA, "expanded")
    assert float(jnp.max(jnp.abs(expected[0].kv_up))) > 0
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


@pytest.mark.parametrize("form", ["expanded", "absorbed", "gathered"])
def test_queries_that_see_nothing_yield_finite_values(form):
    attention, queries, rows, places, selection = inputs()
    nowhere = Places(places.position_BT, jnp.zeros_like(places.segment_BT))
    empty = Selection(selection.index_BTK, jnp.zeros_like(selection.valid_BTK))
    out, _ = attend(form, attention, queries, rows, nowhere, empty, places)
    assert jnp.all(jnp.isfinite(out))


def test_hidden_tokens_do_not_change_the_output():
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (2, 5, 4, 12))
    rows = jax.random.normal(keys[1], (2, 7, 12))
    seen_S = jnp.arange(7) < 4
    seen = jnp.broadcast_to(seen_S, (2, 5, 7))
    expected = latent_attention(query, rows, seen, scale=0.3).values
    noisy = jnp.where(seen_S[:, None], rows, 1e4)
    np.testing.assert_array_equal(latent_attention(query, noisy, seen, scale=0.3).values, expected)


def test_gathering_all_rows_in_any_order_is_dense_attention():
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (2, 5, 4, 12))
    rows = jax.random.normal(keys[1], (2, 7, 12))
    order = jax.random.permutation(keys[2], 7)
    gathered = jnp.broadcast_to(rows[:, None, order], (2, 5, 7, 12))
    everything = jnp.ones((2, 5, 7), bool)
    np.testing.assert_allclose(
        gathered_attention(query, gathered, everything, scale=0.3).values,
        latent_attention(query, rows, everything, scale=0.3).values,
        atol=1e-6,
    )


def test_attention_over_equal_keys_is_the_mean_of_the_values():
    value = jax.random.normal(jax.random.key(0), (1, 6, 2, 3))
    key = jnp.ones((1, 6, 2, 4))
    seen = jnp.tril(jnp.ones((6, 6), bool))[None]
    out = expanded_attention(key, key, value, seen, scale=0.5).values
    counts = jnp.arange(1.0, 7.0)[None, :, None, None]
    expected = jnp.cumsum(value, axis=1) / counts
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_the_form_follows_from_the_amount_of_work():
    mla = load_preset("glm-5").config.mla
    assert cheapest_form(mla, num_queries=4096, num_slots=4096, topk=2048) == "expanded"
    assert cheapest_form(mla, num_queries=1, num_slots=2048, topk=None) == "absorbed"
    assert cheapest_form(mla, num_queries=1, num_slots=131072, topk=2048) == "gathered"
    assert cheapest_form(mla, num_queries=65536, num_slots=65536, topk=2048) == "gathered"
