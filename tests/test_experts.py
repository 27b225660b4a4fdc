import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.collectives import standing_in_for
from glm5_jax.dispatch import dispatch
from glm5_jax.exchange import apply_experts as apply
from glm5_jax.experts import ExpertList, Experts
from glm5_jax.params import abstract, initialize
from glm5_jax.presets import load_preset
from tests.tiny import TINY, tiny_config

CONFIG = tiny_config(TINY)
E, D = CONFIG.moe.num_experts, CONFIG.dim


@pytest.fixture(params=["cpu", "tpu"], autouse=True)
def blocks_of(request):
    """Blocks of the size that either is given; so few tokens make a difference."""
    with standing_in_for(request.param):
        yield request.param


def apply_experts(experts, x, chosen, gates):
    return apply(ExpertList.of(experts), x, chosen, gates, num_experts=E)[0]


def dense(experts, x, expert_BTK, gate_BTK):
    """Every expert on every token, most of them weighted by zero."""
    hidden = jax.nn.silu(jnp.einsum("btd,efd->btef", x, experts.gate))
    hidden = hidden * jnp.einsum("btd,efd->btef", x, experts.up)
    outputs = jnp.einsum("btef,edf->bted", hidden, experts.down)
    weight_BTE = jnp.sum(jax.nn.one_hot(expert_BTK, E) * gate_BTK[..., None], axis=2)
    return jnp.einsum("bted,bte->btd", outputs, weight_BTE)


def problem(num_tokens=50, choices=2, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    experts = initialize(Experts(CONFIG), keys[0], std=0.2)
    x = jax.random.normal(keys[1], (2, num_tokens // 2, D))
    _, chosen = jax.lax.top_k(jax.random.normal(keys[2], (*x.shape[:2], E)), choices)
    return experts, x, chosen, jax.random.normal(keys[3], chosen.shape)


@hypothesis.given(
    st.integers(1, 30), st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**32 - 1)
)
@hypothesis.settings(max_examples=25)
def test_dispatch_gives_every_choice_one_row_of_its_expert(tokens, choices, experts, seed):
    chosen = np.random.default_rng(seed).integers(0, experts, (tokens, choices))
    for kept in {experts, max(1, experts // 2)}:
        plan = dispatch(jnp.asarray(chosen, jnp.int32), kept, chosen.size // experts)
        assert plan.num_used <= len(plan.expert_G)
        token, choice = np.asarray(plan.token_GM), np.asarray(plan.choice_GM)
        block, row = np.nonzero(token < tokens)
        assert np.all(block < plan.num_used)
        assert np.all(np.diff((token < tokens).astype(int), axis=1) <= 0)  # rows in use come first
        pairs = set(zip(token[block, row].tolist(), choice[block, row].tolist(), strict=True))
        expected = set(map(tuple, np.argwhere(chosen < kept).tolist()))
        assert len(block) == len(expected) and pairs == expected
        found = np.asarray(plan.expert_G)[block]
        np.testing.assert_array_equal(found, chosen[token[block, row], choice[block, row]])


@pytest.mark.parametrize("num_tokens", [2, 50, 600])
def test_output_equals_that_of_computing_every_expert(num_tokens):
    args = problem(num_tokens)
    experts, x, chosen, gates = args
    actual = apply_experts(experts, x, chosen, gates)
    np.testing.assert_allclose(actual, dense(*args), atol=2e-4)


def test_a_block_that_is_not_full_has_versions_of_fewer_rows_on_a_cpu(blocks_of, monkeypatch):
    experts, x, chosen, gate = problem(num_tokens=600)
    traced = []

    def apply_one(expert, x_MD, gate_M):
        traced.append(len(x_MD))
        return jnp.zeros(x_MD.shape, jnp.float32)

    monkeypatch.setattr("glm5_jax.experts._apply_one", apply_one)
    jax.make_jaxpr(lambda *arrays: apply_experts(*arrays))(experts, x, chosen, gate)
    assert traced == ([32, 64, 96, 128] if blocks_of == "cpu" else [128])


@pytest.mark.parametrize("only", [0, 3, E - 1])
def test_nothing_is_dropped_when_all_tokens_choose_one_expert(only):
    experts, x, chosen, gates = problem(600, choices=1)
    chosen = jnp.full_like(chosen, only)
    actual = apply_experts(experts, x, chosen, gates)
    np.testing.assert_allclose(actual, dense(experts, x, chosen, gates), atol=2e-4)


@pytest.mark.parametrize("num_tokens", [2, 50, 600])
def test_gradients_equal_those_of_computing_every_expert(num_tokens):
    experts, x, chosen, gates = problem(num_tokens)
    weights = jax.random.normal(jax.random.key(9), x.shape)

    def loss(function):
        return lambda experts, x, gates: jnp.sum(weights * function(experts, x, gates))

    actual = jax.grad(loss(lambda e, x, g: apply_experts(e, x, chosen, g)), argnums=(0, 1, 2))(
        experts, x, gates
    )
    expected = jax.grad(loss(lambda e, x, g: dense(e, x, chosen, g)), argnums=(0, 1, 2))(
        experts, x, gates
    )
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.max(jnp.abs(b))) + 1e-5)


def test_experts_that_no_token_chose_get_no_gradient():
    experts, x, chosen, gates = problem(50)
    chosen = chosen % 3
    gradient = jax.grad(lambda e: jnp.sum(apply_experts(e, x, chosen, gates)))(experts)
    for leaf in jax.tree.leaves(gradient):
        assert np.all(np.asarray(leaf)[3:] == 0) and np.any(np.asarray(leaf)[:3] != 0)


def test_a_layer_finds_its_experts_among_those_of_several():
    stacks = [problem(seed=seed)[0] for seed in range(3)]
    in_a_row = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stacks).in_a_row()
    _, x, chosen, gates = problem()
    for layer, experts in enumerate(stacks):
        held = ExpertList(in_a_row, jnp.int32(layer * E), taught=None)
        found, _ = apply(held, x, chosen, gates, num_experts=E)
        np.testing.assert_array_equal(found, apply_experts(experts, x, chosen, gates))


def test_layers_add_to_the_gradient_of_the_list_that_passes_through_them():
    """It is that of layers that have their own; the layer that is not computed gets none."""
    layers = [problem(seed=seed)[0] for seed in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    _, x, chosen, gates = problem()

    def from_list(stack):
        in_a_row, y = stack.in_a_row(), x
        held = ExpertList(jax.lax.stop_gradient(in_a_row), jnp.int32(0), in_a_row)
        for layer in (2, 0):
            held = held._replace(first=jnp.int32(layer * E))
            y, held = apply(held, y, chosen, gates, num_experts=E)
        return jnp.sum(jnp.sin(y))

    def from_own(layers):
        y = apply_experts(layers[2], x, chosen, gates)
        return jnp.sum(jnp.sin(apply_experts(layers[0], y, chosen, gates)))

    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *jax.grad(from_own)(layers))
    actual = jax.grad(from_list)(stack)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.any(b[0] != 0) and np.any(b[2] != 0) and np.all(b[1] == 0)
        np.testing.assert_array_equal(a, b)


def test_bfloat16_is_summed_in_float32():
    experts, x, chosen, gates = problem(600)
    rounded, x16 = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (experts, x))
    actual = apply_experts(rounded, x16, chosen, gates)
    assert actual.dtype == jnp.bfloat16
    widened, x32 = jax.tree.map(lambda a: a.astype(jnp.float32), (rounded, x16))
    expected = dense(widened, x32, chosen, gates)
    # one rounding of the hidden state and one of the result, each of 8 bits
    scale = float(jnp.max(jnp.abs(expected)))
    np.testing.assert_allclose(actual.astype(jnp.float32), expected, atol=scale * 2**-7)


@pytest.mark.parametrize("with_gradient", [False, True])
def test_bfloat16_experts_are_widened_one_by_one(with_gradient, blocks_of):
    """XLA's CPU backend would widen all of them, and then copy one."""
    if blocks_of != "cpu":
        pytest.skip("of a CPU")
    experts = abstract(Experts(load_preset("bench").config), jnp.bfloat16)
    num_experts, _, dim = experts.gate.shape

    def output(x, experts, chosen, gates):
        held = ExpertList(experts, jnp.int32(0), taught=None)
        return jnp.sum(apply(held, x, chosen, gates, num_experts=num_experts)[0])

    arrays = [((1, 8, dim), jnp.bfloat16), ((1, 8, 4), jnp.int32), ((1, 8, 4), jnp.float32)]
    x, chosen, gates = (jax.ShapeDtypeStruct(*each) for each in arrays)
    function = jax.grad(output) if with_gradient else output
    lowered = jax.jit(function).lower(x, experts, chosen, gates)
    size = sum(2 * leaf.size for leaf in jax.tree.leaves(experts))
    assert lowered.compile().memory_analysis().temp_size_in_bytes < size / 2
