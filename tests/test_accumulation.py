"""What is learnt from a batch does not depend on how it is computed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glm5_jax.collectives import MESH_AXES
from glm5_jax.mesh import make_mesh
from glm5_jax.model import forward
from glm5_jax.moe import Routing
from glm5_jax.places import Places
from glm5_jax.sharding import TRAIN, Partition
from tests.test_sharded import RAW
from tests.tiny import tiny_config
from train.balance import imbalance
from train.optimizer import make_recipe
from train.settings import Settings
from train.state import assemble, start
from train.step import make_step

pytestmark = pytest.mark.standard_promotion  # the schedules of optax mix dtypes

CONFIG = tiny_config(
    RAW
    | {
        "num_hidden_layers": 3,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "indexer_types": ["full", "shared", "shared"],
    }
)
SETTINGS = Settings(mtp_depth=2, balance_weight=1e-2, z_weight=1e-3, balance_rate=1e-3)
TOKENS = np.random.default_rng(0).integers(2, CONFIG.vocab_size, (8, 20)).astype(np.int32)
# Documents of all lengths, and padding that differs from row to row.
LENGTHS = [(20,), (9, 11), (7, 6, 5), (3, 3), (12, 1, 4), (1,), (2, 17), (10, 10)]


def segments_of(lengths, size):
    numbered = [np.repeat(np.arange(1, len(row) + 1), row) for row in lengths]
    return np.stack([np.pad(row, (0, size - len(row))) for row in numbered]).astype(np.int32)


SEGMENTS = segments_of(LENGTHS, 20)


def recipe():
    """Whose update is the gradient, so that no optimizer magnifies rounding or hides a factor."""
    return make_recipe(CONFIG, SETTINGS)._replace(optimizer=optax.sgd(1.0))


def updated(tokens, shape=(1, 1, 1), microbatches=1, dtype="float32"):
    """The state before a step and after it, and its metrics."""
    return _updated(tokens, shape, microbatches, dtype)


@functools.cache
def _updated(tokens, shape, microbatches, dtype):
    devices = jax.devices()[: int(np.prod(shape))]
    mesh = make_mesh(dict(zip(MESH_AXES, shape, strict=True)), devices)
    partition = Partition(mesh, TRAIN)
    state = start(CONFIG, recipe(), partition, seed=0)
    before = {path: np.asarray(w) for path, w in state.params.items()}
    step = make_step(CONFIG, recipe(), partition, dtype=dtype, microbatches=microbatches)
    with jax.set_mesh(mesh):
        state, metrics = step(state, *BATCHES[tokens])
    return before, {path: np.asarray(w) for path, w in state.params.items()}, metrics


def repacked():
    """The same documents, each in a row of its own."""
    rows, lengths = [], []
    for row, parts in zip(TOKENS, LENGTHS, strict=True):
        for end, length in zip(np.cumsum(parts), parts, strict=True):
            rows.append(np.pad(row[end - length : end], (0, 20 - length)))
            lengths.append((length,))
    missing = -len(rows) % 8
    rows += [np.zeros(20, np.int32)] * missing
    return np.stack(rows), segments_of(lengths + [()] * missing, 20)


BATCHES = {"packed": (TOKENS, SEGMENTS), "apart": repacked()}


def assert_same_update(actual, expected):
    before, after, metrics = expected
    for path, weight in actual[1].items():
        step, wanted = weight - before[path], after[path] - before[path]
        np.testing.assert_allclose(
            step, wanted, rtol=0, atol=1e-6 * max(1.0, np.abs(wanted).max()), err_msg=path
        )
    for name, value in metrics.losses._asdict().items():
        np.testing.assert_allclose(
            getattr(actual[2].losses, name), value, rtol=1e-5, atol=1e-6, err_msg=name
        )


@pytest.mark.parametrize("microbatches", [2, 4, 8])
def test_microbatches_add_up_to_the_batch(microbatches):
    """Though each has its own number of tokens, documents and padding."""
    assert_same_update(updated("packed", microbatches=microbatches), updated("packed"))


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_eight_devices_update_as_one_does(shape):
    assert_same_update(updated("packed", shape), updated("packed"))


def test_devices_accumulate_too():
    assert_same_update(updated("packed", (2, 2, 2), 2), updated("packed"))


def test_documents_packed_into_rows_update_as_apart():
    assert_same_update(updated("apart", microbatches=2), updated("packed"))


def test_steps_in_bfloat16_keep_weights_and_direction():
    before, after, metrics = updated("packed", dtype="bfloat16")
    _, expected, exact = updated("packed")
    steps = [
        np.concatenate([(weights[path] - before[path]).ravel() for path in recipe().learnt])
        for weights in (after, expected)
    ]
    assert all(weight.dtype == np.float32 for weight in after.values())
    assert steps[0] @ steps[1] > 0.98 * np.linalg.norm(steps[0]) * np.linalg.norm(steps[1])
    np.testing.assert_allclose(metrics.losses.next_token, exact.losses.next_token, rtol=0.01)


@pytest.mark.parametrize(("shape", "microbatches"), [((1, 1, 1), 4), ((2, 2, 2), 2)])
def test_router_biases_move_by_the_counts_of_the_whole_batch(shape, microbatches):
    before, after, _ = updated("packed", shape, microbatches)
    moved = {path: after[path] - before[path] for path in before if path.endswith("router.bias")}
    checked = 0
    for path, chosen in chosen_experts(before).items():
        for group, expert_BTK in enumerate(chosen):
            counts = np.bincount(expert_BTK[SEGMENTS > 0].ravel(), minlength=8)
            expected = 1e-3 * np.sign(counts.mean() - counts)
            np.testing.assert_allclose(moved[path][group], expected, atol=1e-7)
            checked += 1
    assert checked == sum(kind.mlp == "moe" for kind in CONFIG.layers)


@jax.jit
def observed(params):
    model, places = assemble(CONFIG, params), Places.packed(SEGMENTS)
    return forward(model, TOKENS, places, observe=lambda report: report.routing).observed


def chosen_experts(params):
    """The experts of each token of the batch, by the path of their router's bias."""
    return {
        f"segments.{number}.layers.{slot}.mlp.router.bias": np.asarray(routing.expert_BTK)
        for number, segment in enumerate(observed(params))
        for slot, routing in enumerate(segment)
        if routing is not None
    }


def test_the_imbalance_is_that_of_each_document():
    rng = np.random.default_rng(1)
    score = rng.uniform(0.1, 0.9, (2, 12, 6)).astype(np.float32)
    expert = np.argsort(-score + rng.normal(size=score.shape), axis=-1)[..., :2].astype(np.int32)
    segment = segments_of([(5, 6), (12,)], 12)
    counted = (segment > 0) & (rng.uniform(size=segment.shape) < 0.8)
    expected = 0.0
    for row, number in ((0, 1), (0, 2), (1, 1)):
        of = (segment[row] == number) & counted[row]
        often = np.bincount(expert[row][of].ravel(), minlength=6) * 6 / (2 * of.sum())
        share = (score[row][of] / score[row][of].sum(-1, keepdims=True)).mean(axis=0)
        expected += of.sum() * np.sum(often * share)
    routing = Routing(jnp.asarray(expert), jnp.zeros((2, 12, 2)), jnp.asarray(score))
    actual = imbalance(routing, jnp.asarray(segment), jnp.asarray(counted))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    even = Routing(jnp.arange(6).reshape(1, 3, 2), routing.gate_BTK, jnp.full((1, 3, 6), 0.3))
    ones = jnp.ones((1, 3), jnp.int32)
    np.testing.assert_allclose(imbalance(even, ones, ones > 0), 3.0, rtol=1e-6)
