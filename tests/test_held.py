import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.attention import cheapest_form
from glm5_jax.gathered import gathered_attention
from glm5_jax.held import block_of_held, in_blocks
from glm5_jax.presets import load_preset

B, T, N, A, S, K = 2, 5, 8, 12, 40, 16


def given(dtype=jnp.float32):
    """Queries, the rows of some of S slots, and K slots for each query of which some are held."""
    keys = jax.random.split(jax.random.key(0), 4)
    query = jax.random.normal(keys[0], (B, T, N, A), dtype)
    rows = jax.random.normal(keys[1], (B, S, A), dtype)
    order = jnp.argsort(jax.random.normal(keys[2], (B, T, S)), axis=-1)
    held = jax.random.bernoulli(keys[3], 0.3, (B, T, K)).at[0, 0].set(True).at[1, 2].set(False)
    return query, rows, order[..., :K], held


def attend(query, rows, slot, held):
    taken = rows[jnp.arange(B)[:, None, None], slot]
    return gathered_attention(query, taken, held, scale=0.4)


@pytest.mark.parametrize("block", [1, 3, 8, K])
def test_blocks_of_held_tokens_come_to_attention_to_all_of_them(block):
    query, rows, slot, held = given()
    expected = attend(query, rows, slot, held)
    actual = jax.jit(
        lambda: in_blocks(lambda *part: attend(query, rows, *part), query, slot, held, block)
    )()
    some = np.asarray(held.any(axis=-1))
    assert not some.all()
    np.testing.assert_allclose(actual.values[some], expected.values[some], atol=2e-6)
    np.testing.assert_allclose(actual.log_total_BTN[some], expected.log_total_BTN[some], atol=2e-6)
    assert jnp.isfinite(actual.values).all() and (actual.log_total_BTN[~some] < -1e38).all()


def test_sums_of_blocks_are_rounded_once():
    query, rows, slot, held = given(jnp.bfloat16)
    actual = in_blocks(lambda *part: attend(query, rows, *part), query, slot, held, 4)
    assert actual.values.dtype == jnp.bfloat16 and actual.log_total_BTN.dtype == jnp.float32
    wide = [x.astype(jnp.float32) for x in (query, rows)]
    expected = attend(*wide, slot, held)
    some = np.asarray(held.any(axis=-1))
    np.testing.assert_allclose(actual.values[some], expected.values[some], atol=0.03)


def test_no_more_blocks_are_gathered_than_the_most_held():
    query, rows, slot, held = given()
    held = held.at[0, 0].set(jnp.arange(K) % 3 == 0)
    parts = []

    def watched(slot_BTM, valid_BTM):
        jax.debug.callback(lambda valid: parts.append(int(valid.sum())), valid_BTM)
        return attend(query, rows, slot_BTM, valid_BTM)

    jax.block_until_ready(in_blocks(watched, query, slot, held, 2))
    jax.effects_barrier()
    assert len(parts) == -(-int(held.sum(axis=-1).max()) // 2) and sum(parts) == held.sum()


def test_a_mesh_gathers_as_soon_as_a_device_has_few_of_the_selected():
    mla = load_preset("glm-5").config.mla
    assert block_of_held(2048, 8) == 512 and block_of_held(2048, 1) == 2048
    assert cheapest_form(mla, 1, 4096, 2048, shards=8) == "gathered"
    assert cheapest_form(mla, 1, 4096, 2048) == "absorbed"
    assert cheapest_form(mla, 1, 1024, 2048, shards=8) == "absorbed"
    assert cheapest_form(mla, 4096, 4096, 2048, shards=8) != "expanded"
