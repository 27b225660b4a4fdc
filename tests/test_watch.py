"""Steps that would do harm are skipped, and nothing else is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.sharding import on_one_device
from tests.tiny import SHARED, tiny_config
from train.optimizer import make_recipe
from train.settings import Settings
from train.state import start
from train.step import make_step
from train.watch import Watch

pytestmark = pytest.mark.standard_promotion

TOKENS = np.asarray(jax.random.randint(jax.random.key(0), (4, 24), 2, 97))
SEGMENTS = np.ones((4, 24), np.int32)


def watched(seen, is_taken=True):
    """A watch after steps of the given losses and norms."""
    watch = Watch.new()
    step = jax.jit(Watch.after)
    for loss, norm in seen:
        watch = step(watch, jnp.float32(loss), jnp.float32(norm), jnp.asarray(is_taken))
    return watch


@pytest.mark.parametrize("count", [1, 2, 77, 128])
def test_mean_and_variance_are_those_of_the_steps_taken(count):
    seen = np.random.default_rng(0).normal([3, 40], [0.1, 5], (count, 2))
    watch = watched(seen)
    np.testing.assert_allclose(watch.mean_2, seen.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(watch.variance_2, seen.var(axis=0), rtol=1e-3, atol=1e-8)
    assert (int(watch.taken), int(watch.skipped), int(watch.in_a_row)) == (count, 0, 0)


def test_later_steps_weigh_more_than_those_long_ago():
    seen = np.concatenate([np.full((300, 2), 9.0), np.full((600, 2), 2.0)])
    np.testing.assert_allclose(watched(seen).mean_2, 2.0, atol=0.1)


@pytest.mark.parametrize(
    ("loss", "norm", "deviations", "usual"),
    [
        (3.0, 40.0, 6.0, True),
        (3.5, 40.0, 6.0, True),  # five deviations
        (3.8, 40.0, 6.0, False),
        (3.0, 80.0, 6.0, False),
        (-9.0, 0.0, 6.0, True),
        (3.8, 80.0, 0.0, True),
        (np.nan, 40.0, 0.0, False),
        (3.0, np.inf, 0.0, False),
        (np.nan, np.nan, 6.0, False),
    ],
)
def test_unusual_is_what_is_not_finite_or_far_above_the_mean(loss, norm, deviations, usual):
    seen = np.random.default_rng(0).normal([3, 40], [0.1, 5], (128, 2))
    watch = watched(seen)
    assert bool(watch.is_usual(jnp.float32(loss), jnp.float32(norm), deviations)) == usual


def test_among_the_first_steps_only_what_is_not_finite_is_unusual():
    watch = watched(np.full((63, 2), 1.0))
    assert watch.is_usual(jnp.float32(50), jnp.float32(50), 6.0)
    assert not watch.is_usual(jnp.float32(jnp.nan), jnp.float32(1), 6.0)
    later = watched(np.full((64, 2), 1.0))
    assert not later.is_usual(jnp.float32(50), jnp.float32(50), 6.0)


def test_skipped_steps_are_counted_and_forgotten():
    watch = watched([(2.0, 1.0)] * 3)
    skipped = watch.after(jnp.float32(jnp.nan), jnp.float32(jnp.nan), jnp.asarray(False))
    skipped = skipped.after(jnp.float32(1e9), jnp.float32(1), jnp.asarray(False))
    assert (int(skipped.taken), int(skipped.skipped), int(skipped.in_a_row)) == (3, 2, 2)
    np.testing.assert_array_equal(skipped.mean_2, watch.mean_2)
    np.testing.assert_array_equal(skipped.variance_2, watch.variance_2)
    assert int(skipped.after(jnp.float32(2), jnp.float32(1), jnp.asarray(True)).in_a_row) == 0


def training(**settings):
    config = tiny_config(SHARED)
    recipe = make_recipe(config, Settings(mtp_depth=1, warmup_steps=5, steps=10, **settings))
    state = start(config, recipe, on_one_device(), seed=0)
    return state, make_step(config, recipe, on_one_device()), recipe


def values(state):
    return jax.tree.map(np.array, (state.params, state.optimizer, state.average))


def test_a_harmful_step_changes_nothing_but_the_count():
    """Neither weights, router biases, the optimizer and its schedule, nor the average."""
    state, step, recipe = training(average_decay=0.5)
    state, metrics = step(state, TOKENS, SEGMENTS)
    assert metrics.is_taken and metrics.in_a_row == 0
    before, poisoned = (
        values(state),
        dataclasses.replace(
            state,
            watch=dataclasses.replace(
                state.watch,
                taken=jnp.int32(64),
                remembered=jnp.int32(64),
                mean_2=jnp.float32([1, 1]),
            ),
        ),
    )
    after, metrics = step(poisoned, TOKENS, SEGMENTS)  # whose loss is 4.6 and deviates from 1 by 0
    assert not metrics.is_taken and metrics.in_a_row == 1 and int(after.step) == 2
    assert float(metrics.rate) == float(recipe.rate(64))
    jax.tree.map(np.testing.assert_array_equal, values(after), before)


def test_weights_that_would_have_no_norm_are_not_taken():
    state, step, _ = training(learning_rate=1e30)
    state, metrics = step(state, TOKENS, SEGMENTS)  # at a rate of 0
    before = values(state)
    state, metrics = step(state, TOKENS, SEGMENTS)
    assert not metrics.is_taken and np.isfinite(metrics.gradient_norm)
    jax.tree.map(np.testing.assert_array_equal, values(state), before)


def test_the_average_follows_the_weights():
    state, step, recipe = training(average_decay=0.75)
    expected = {path: np.array(state.params[path]) for path in recipe.learnt}
    for _ in range(3):
        state, _ = step(state, TOKENS, SEGMENTS)
        for path, weight in expected.items():
            expected[path] = 0.75 * weight + 0.25 * np.array(state.params[path])
    assert state.average.keys() == expected.keys()
    for path, weight in expected.items():
        np.testing.assert_allclose(state.average[path], weight, rtol=1e-5, atol=1e-7)


def test_the_weight_of_mtp_and_the_balancing_follow_their_schedules():
    settings = {"mtp_weight": 0.3, "final_mtp_weight": 0.1, "mtp_weight_part": 0.6}
    state, step, recipe = training(**settings, balance_rate=0.01, balance_part=0.2)
    weights = [float(recipe.mtp_weight(taken)) for taken in range(10)]
    np.testing.assert_allclose(weights, [0.3] * 6 + [0.1] * 4, rtol=1e-6)
    biases = [path for path in state.params if path.endswith("router.bias")]
    seen = []
    for _ in range(4):
        seen.append(np.concatenate([np.array(state.params[path]).ravel() for path in biases]))
        state, _ = step(state, TOKENS, SEGMENTS)
    moved = [bool(np.any(one != other)) for one, other in zip(seen, seen[1:], strict=False)]
    assert moved == [True, True, False]
