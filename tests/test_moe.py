import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.experts import ExpertList, Experts
from glm5_jax.moe import Moe, Router
from glm5_jax.params import initialize
from tests.reference.numpy_glm5 import Layer
from tests.tiny import GROUPED, TINY, random_weights, tiny_config

LAYER = 5  # a MoE layer of both configs


def router_and_reference(raw, seed=0):
    weights = random_weights(raw, seed)
    prefix = f"model.layers.{LAYER}."
    router = Router(tiny_config(raw))
    router.weight = jnp.asarray(weights[f"{prefix}mlp.gate.weight"])
    router.bias = jnp.asarray(weights[f"{prefix}mlp.gate.e_score_correction_bias"])
    widened = {name: w.astype(np.float64) for name, w in weights.items()}
    return router, Layer(widened, prefix, raw, full=True, moe=True)


@pytest.mark.parametrize("raw", [TINY, GROUPED], ids=["plain", "grouped"])
def test_experts_and_gates_are_those_of_the_reference(raw):
    router, reference = router_and_reference(raw)
    x = np.random.default_rng(1).standard_normal((1, 40, raw["hidden_size"])).astype(np.float32)
    routing = router(jnp.asarray(x))
    for t in range(x.shape[1]):
        chosen, gates = reference.route(x[0, t].astype(np.float64))
        order = np.argsort(routing.expert_BTK[0, t])
        np.testing.assert_array_equal(routing.expert_BTK[0, t][order], chosen)
        np.testing.assert_allclose(routing.gate_BTK[0, t][order], gates, rtol=1e-5)


def test_bias_changes_which_experts_are_chosen_but_not_their_gates():
    router, _ = router_and_reference(TINY | {"norm_topk_prob": False})
    x = jax.random.normal(jax.random.key(0), (1, 30, router.weight.shape[1]))
    favoured = 6
    before = router(x)
    router.bias = router.bias.at[favoured].set(10.0)
    after = router(x)
    assert jnp.all(jnp.any(after.expert_BTK == favoured, axis=-1))
    assert not jnp.all(jnp.any(before.expert_BTK == favoured, axis=-1))
    scores = jax.nn.sigmoid(jnp.einsum("btd,ed->bte", x, router.weight))
    expected = jnp.take_along_axis(scores, after.expert_BTK, axis=-1) * 2.5
    np.testing.assert_allclose(after.gate_BTK, expected, rtol=1e-5)


def test_normalised_gates_sum_to_their_scale():
    router, _ = router_and_reference(TINY)
    x = jax.random.normal(jax.random.key(0), (2, 15, router.weight.shape[1]))
    np.testing.assert_allclose(jnp.sum(router(x).gate_BTK, axis=-1), 2.5, rtol=1e-6)


def test_groups_are_ruled_out_also_where_all_scores_are_negative():
    router, reference = router_and_reference(GROUPED)
    bias = "mlp.gate.e_score_correction_bias"
    router.bias, reference.w[bias] = router.bias - 5, reference.w[bias] - 5
    x = np.random.default_rng(2).standard_normal((1, 60, GROUPED["hidden_size"]))
    chosen = np.asarray(router(jnp.asarray(x, jnp.float32)).expert_BTK)[0]
    for t, experts in enumerate(chosen):
        np.testing.assert_array_equal(np.sort(experts), reference.route(x[0, t])[0])


def test_routing_of_bfloat16_is_computed_in_float32():
    router, _ = router_and_reference(TINY)
    x = jax.random.normal(jax.random.key(0), (1, 200, router.weight.shape[1]), jnp.bfloat16)
    widened = router(x.astype(jnp.float32))
    np.testing.assert_array_equal(router(x).gate_BTK, widened.gate_BTK)


def test_loads_count_the_choices_of_real_tokens():
    config = tiny_config(TINY)
    moe, experts = initialize((Moe(config), Experts(config)), jax.random.key(0), std=0.2)
    x = jax.random.normal(jax.random.key(1), (2, 9, config.dim))
    real = jnp.arange(9) < jnp.array([[9], [4]])
    _, _, load, _ = moe(x, ExpertList.of(experts), real, ())
    chosen = np.asarray(moe.router(x).expert_BTK)[np.asarray(real)]
    np.testing.assert_array_equal(load, np.bincount(chosen.reshape(-1), minlength=8))
    assert int(load.sum()) == 13 * config.moe.experts_per_token


def test_padding_reads_no_expert():
    config = tiny_config(TINY)
    moe, experts = initialize((Moe(config), Experts(config)), jax.random.key(0), std=0.2)
    x = jax.random.normal(jax.random.key(1), (2, 9, config.dim))
    nowhere = jax.tree.map(lambda weight: jnp.full_like(weight, jnp.nan), experts)
    y, *_ = moe(x, ExpertList.of(nowhere), jnp.zeros((2, 9), bool), ())
    np.testing.assert_array_equal(y, moe.shared(x))
