import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.params import leaves_by_path
from glm5_jax.places import Places
from glm5_jax.sharding import on_one_device
from tests.tiny import SHARED, TOKENS, random_model, tiny_config
from train.loss import Loads, Objective, loss
from train.optimizer import balance, make_recipe
from train.settings import Settings
from train.state import assemble, start
from train.step import make_step

OBJECTIVE = Objective(mtp_depth=2, mtp_weight=0.3, index_weight=1.0)


@pytest.fixture(scope="module")
def model():
    return random_model(SHARED)


def losses(model, tokens, segments, objective=OBJECTIVE):
    places = Places.packed(jnp.asarray(segments))
    return jax.jit(lambda model: loss(model, jnp.asarray(tokens), places, objective))(model)


def test_the_total_is_the_weighted_sum_of_its_parts(model):
    total, (parts, _) = losses(model, [TOKENS], [[1] * 24])
    expected = parts.next_token + 0.3 * jnp.mean(parts.mtp_D) + parts.indexers
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert parts.mtp_D.shape == (2,)


def test_losses_of_packed_documents_are_those_of_the_documents_apart(model):
    """The mean over all targets: of a document of n tokens, n - 1 - d have one at depth d."""
    first, second = TOKENS[:9], TOKENS[4:19]
    packed = losses(model, [first + second + [0] * 3], [[1] * 9 + [2] * 15 + [0] * 3])
    apart = [losses(model, [part], [[1] * len(part)]) for part in (first, second)]
    for depth in range(3):
        weights = np.array([9, 15]) - 1 - depth
        values = [
            parts.next_token if depth == 0 else parts.mtp_D[depth - 1] for _, (parts, _) in apart
        ]
        together = packed[1][0]
        actual = together.next_token if depth == 0 else together.mtp_D[depth - 1]
        np.testing.assert_allclose(actual, np.average(values, weights=weights), rtol=1e-5)
    indexers = [parts.indexers for _, (parts, _) in apart]
    weights = 7 * np.array([9, 15]) + np.array([8 + 7, 14 + 13])  # layers, then depths
    np.testing.assert_allclose(
        packed[1][0].indexers, np.average(indexers, weights=weights), rtol=1e-4
    )


def test_loads_count_real_tokens_of_every_moe_layer(model):
    _, (_, loads) = losses(model, [TOKENS + [0] * 4], [[1] * 24 + [0] * 4])
    config = model.config
    counted = [load for segment in loads.segments for load in segment if load is not None]
    assert sum(len(load) for load in counted) == 4
    for load in counted:
        np.testing.assert_array_equal(load.sum(axis=-1), 24 * config.moe.experts_per_token)
    assert loads.mtp_E.sum() == (23 + 22) * config.moe.experts_per_token


def test_balancing_raises_experts_below_the_mean_and_lowers_those_above():
    bias = jnp.array([[0.5, 0.0, -0.5, 0.25]])
    path = "segments.0.layers.0.mlp.router.bias"
    loads = Loads(((jnp.array([[9, 1, 2, 4]]),),), None)
    moved = balance({path: bias, "other": bias}, loads, OBJECTIVE, 0.1)
    np.testing.assert_allclose(moved[path], [[0.4, 0.1, -0.4, 0.25]])
    assert moved["other"] is bias


def training(raw, objective=OBJECTIVE, rate=1e-2, decay=0.1, balance_rate=1e-3, **changes):
    config = tiny_config(raw)
    settings = Settings(
        learning_rate=rate,
        final_learning_rate=rate / 10,
        warmup_steps=5,
        steps=100,
        weight_decay=decay,
        balance_rate=balance_rate,
        **dataclasses.asdict(objective) | changes,
    )
    recipe = make_recipe(config, settings)
    state = start(config, recipe, on_one_device(), seed=0)
    return state, make_step(config, recipe, on_one_device())


@pytest.mark.standard_promotion
def test_a_small_model_learns_and_all_its_parts_move():
    state, step = training(SHARED)
    before = {path: np.asarray(w) for path, w in state.params.items()}
    tokens = jax.random.randint(jax.random.key(0), (4, 24), 2, 97)
    segments = jnp.ones((4, 24), jnp.int32)
    history = []
    for _ in range(40):
        state, metrics = step(state, tokens, segments)
        history.append(metrics)
    first, last = history[0].losses, history[-1].losses
    assert first.next_token > 4.5 and last.next_token < 2.0
    assert jnp.all(last.mtp_D < first.mtp_D - 1)
    for path, weight in state.params.items():
        assert np.any(np.asarray(weight) != before[path]), path
    assert int(state.step) == 40


def test_indexers_do_not_move_the_model():
    """Whatever weight their loss has, the other weights are trained the same."""
    tokens = jax.random.randint(jax.random.key(0), (2, 24), 2, 97)
    segments = jnp.ones((2, 24), jnp.int32)
    gradients = []
    for weight in (0.0, 1.0, 7.0):
        objective = dataclasses.replace(OBJECTIVE, index_weight=weight)
        model = random_model(SHARED)
        gradient = jax.jit(
            jax.grad(lambda m, o=objective: loss(m, tokens, Places.packed(segments), o)[0])
        )
        gradients.append(leaves_by_path(gradient(model)))
    for path in gradients[0]:
        if ".indexer." not in path:
            for other in gradients[1:]:
                np.testing.assert_allclose(gradients[0][path], other[path], atol=1e-6)
        else:
            assert not np.any(gradients[0][path])
            np.testing.assert_allclose(7 * gradients[1][path], gradients[2][path], atol=1e-6)


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"mtp_depth": 0}, r"mtp\..*"),
        ({"mtp_weight": 0.0}, r"mtp\.(?!block\.indexer\.).*"),
        ({"index_weight": 0.0}, r".*\.indexer\..*"),
        ({"stage": "dense"}, r".*\.indexer\..*"),
        ({"stage": "warmup"}, r"(?!.*\.indexer\.).*"),
    ],
)
def test_weights_outside_the_objective_stay_as_they_were(changes, kept):
    """Neither decay nor the balancing of experts moves them; all others move."""
    state, step = training(SHARED, dataclasses.replace(OBJECTIVE, **changes))
    before = {path: np.asarray(w) for path, w in state.params.items()}
    tokens = jax.random.randint(jax.random.key(0), (2, 24), 2, 97)
    for _ in range(3):
        state, metrics = step(state, tokens, jnp.ones((2, 24), jnp.int32))
    kept_paths = tuple(path for path in state.params if re.fullmatch(kept, path))
    assert not any(leaf.endswith(kept_paths) for leaf in leaves_by_path(state.optimizer))
    for path, weight in state.params.items():
        is_same = np.array_equal(weight, before[path])
        assert is_same == bool(re.fullmatch(kept, path)), path
    squares = [np.sum(np.square(w, dtype=np.float64)) for w in state.params.values()]
    np.testing.assert_allclose(metrics.weight_norm, np.sqrt(np.sum(squares)), rtol=1e-5)


def test_recomputing_layers_trains_the_same():
    tokens = jax.random.randint(jax.random.key(0), (2, 24), 2, 97)
    segments = jnp.ones((2, 24), jnp.int32)
    model = random_model(SHARED)
    values = [
        jax.jit(
            jax.value_and_grad(
                lambda m, r=remat: loss(m, tokens, Places.packed(segments), OBJECTIVE, remat=r)[0]
            )
        )(model)
        for remat in ("none", "layers", "products")
    ]
    for a, b in zip(jax.tree.leaves(values[0]), jax.tree.leaves(values[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_model_is_put_together_from_its_weights():
    model = random_model(SHARED)
    again = assemble(model.config, leaves_by_path(model))
    assert leaves_by_path(again).keys() == leaves_by_path(model).keys()
    assert all(a is b for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(again), strict=True))
