"""Learning rates, and the updates that gradients become."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.collectives import MESH_AXES
from glm5_jax.errors import InputError
from glm5_jax.mesh import make_mesh
from glm5_jax.model import Glm5
from glm5_jax.params import ParamSpec, leaves_by_path
from glm5_jax.sharding import TRAIN, Partition
from tests.test_sharded import CONFIG
from tests.tiny import TINY, random_model
from train.muon import Cut, orthogonalized
from train.optimizer import learning_rate, make_optimizer, make_recipe
from train.settings import Settings


def rates(steps, **options):
    settings = Settings(
        learning_rate=1.0, final_learning_rate=0.1, warmup_steps=10, steps=110, **options
    )
    return [float(learning_rate(settings)(step)) for step in steps]


@pytest.mark.parametrize(
    ("schedule", "later"),
    [
        ("cosine", {60: 0.55, 110: 0.1, 500: 0.1}),
        ("linear", {35: 0.775, 110: 0.1, 500: 0.1}),
        ("wsd", {60: 1.0, 87: 1.0, 88: 1.0, 99: 0.55, 110: 0.1, 500: 0.1}),
    ],
)
def test_the_learning_rate_rises_in_a_line_and_falls_to_the_last_step(schedule, later):
    expected = {0: 0.0, 5: 0.5, 10: 1.0} | later
    actual = rates(expected, schedule=schedule)
    np.testing.assert_allclose(actual, list(expected.values()), rtol=1e-5)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("cuts", [None, {}], ids=["adamw", "muon"])
def test_only_matrices_decay(cuts):
    """With gradients of zero, decay alone moves weights."""
    model = random_model(TINY)
    specs, params = (leaves_by_path(tree) for tree in (Glm5(model.config), model))
    optimizer = make_optimizer(specs, lambda step: 1.0, 0.5, 1.0, cuts)

    @jax.jit
    def update(params):
        nothing = jax.tree.map(jnp.zeros_like, params)
        return optimizer.update(nothing, optimizer.init(params), params)[0]

    for path, moved in update(params).items():
        assert bool(jnp.any(moved != 0)) == (specs[path].start == "normal"), path


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"learning_rate": 3e-5}, "final_learning_rate is 0.0001, expected at most"),
        ({"decay_part": 0.0}, "decay_part is 0.0, expected more than 0"),
        ({"microbatches": 0}, "microbatches is 0, expected at least 1"),
        ({"schedule": "steps"}, "schedule is steps, expected one of cosine, linear, wsd"),
        ({"stage": "warmup", "index_weight": 0.0}, "nothing would be learnt"),
    ],
)
def test_senseless_settings_are_refused(options, named):
    with pytest.raises(InputError, match=named):
        Settings(**options)


def heads(update, sizes):
    """The blocks of [heads, rows, columns], each of which Muon Split makes orthogonal."""
    return [block for head in update for block in np.split(head, np.cumsum(sizes)[:-1])]


@pytest.mark.parametrize(
    ("axes", "shape", "cut", "matrices"),
    [
        ("ffn embed", (24, 16), Cut(by_head=False), lambda u: [u]),
        ("layers ffn embed", (2, 24, 16), Cut(by_head=False), list),
        ("heads head_dim q_rank", (3, 8, 16), Cut(by_head=False), lambda u: [u.reshape(24, 16)]),
        ("heads head_dim q_rank", (3, 8, 16), Cut(by_head=True), list),
        ("heads head_dim kv_rank", (3, 12, 16), Cut(True, (4, 8)), lambda u: heads(u, (4, 8))),
        ("embed heads head_dim", (16, 3, 8), Cut(by_head=False), lambda u: [u.reshape(16, 24)]),
    ],
)
def test_muon_makes_the_matrices_of_a_weight_orthogonal(axes, shape, cut, matrices):
    """Their directions stay, their singular values come near 1 and, times that, to a size."""
    gradient = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    spec = ParamSpec(shape, tuple(axes.split()), "normal")
    update = np.asarray(orthogonalized(jnp.asarray(gradient), spec, cut))
    found = matrices(update)
    assert sum(matrix.size for matrix in found) == update.size
    for matrix, before in zip(found, matrices(gradient), strict=True):
        near = turned(matrix, before) / (0.2 * max(matrix.shape) ** 0.5)
        assert near.min() > 0.6 and near.max() < 1.3


def turned(matrix, before):
    """The singular values that a matrix has now in the directions it had before, and no others."""
    left, values, right = np.linalg.svd(before, full_matrices=False)
    now = left.T @ matrix @ right.T
    others = now - np.diag(np.diag(now))
    np.testing.assert_allclose(others, 0, atol=2e-3 * np.abs(now).max())
    return np.diag(now)[values > values.max() / 20]  # small ones take more iterations


@pytest.mark.standard_promotion
def test_muon_split_cuts_queries_keys_and_values_and_nothing_else():
    names = ("adamw", "muon", "muon_split")
    settings = {name: Settings(optimizer=name, weight_decay=0.0) for name in names}
    # A head's keys and values have more rows than columns, or its parts would be orthogonal too.
    model = random_model(TINY | {"kv_lora_rank": 16})
    config, params = model.config, leaves_by_path(model)
    specs = leaves_by_path(Glm5(config))
    gradients = {path: jnp.asarray(w) + 0.01 for path, w in params.items()}
    updates = {}
    for name, chosen in settings.items():
        recipe = make_recipe(config, chosen)
        learnt = {path: params[path] for path in recipe.learnt}
        given = {path: gradients[path] for path in recipe.learnt}

        def update(learnt, given, optimizer=recipe.optimizer):
            state = optimizer.init(learnt)
            _, state = optimizer.update(given, state, learnt)  # the first rate is 0
            return optimizer.update(given, state, learnt)[0]

        updates[name] = jax.jit(update)(learnt, given)
    for path in updates["adamw"]:
        adamw, muon, split = (np.asarray(updates[name][path]) for name in settings)
        is_vocabulary = path in ("embedding", "head")
        is_matrix = specs[path].start == "normal"
        assert np.allclose(adamw, muon, rtol=1e-3, atol=1e-8) == (is_vocabulary or not is_matrix), (
            path
        )
        assert np.allclose(muon, split, rtol=1e-3, atol=1e-8) == (
            not path.endswith(("q_up", "kv_up"))
        ), path
        if path.endswith("kv_up"):
            sizes = (config.mla.nope_dim, config.mla.value_dim)
            parts, before = (
                heads(each.reshape(-1, sum(sizes), 16), sizes) for each in (split, gradients[path])
            )
            for part, gradient in zip(parts, before, strict=True):
                values = -turned(part, gradient)
                assert 0 < values.max() < 2 * values.min(), path


@pytest.mark.standard_promotion
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_muon_on_a_mesh_is_that_of_one_device(shape):
    specs = leaves_by_path(Glm5(CONFIG))
    rng = np.random.default_rng(0)
    recipe = make_recipe(CONFIG, Settings(optimizer="muon_split"))
    values = {path: rng.normal(size=specs[path].shape).astype(np.float32) for path in recipe.learnt}

    @jax.jit
    def update(given):
        optimizer = recipe.optimizer
        _, state = optimizer.update(given, optimizer.init(given), given)
        return optimizer.update(given, state, given)[0]

    mesh = make_mesh(dict(zip(MESH_AXES, shape, strict=True)))
    partition = Partition(mesh, TRAIN)
    placed = {
        path: jax.device_put(w, partition.sharding(specs[path])) for path, w in values.items()
    }
    with jax.set_mesh(mesh):
        actual = update(placed)
    for path, expected in update(values).items():
        assert actual[path].sharding.spec == placed[path].sharding.spec
        np.testing.assert_allclose(actual[path], expected, rtol=1e-3, atol=1e-8, err_msg=path)
