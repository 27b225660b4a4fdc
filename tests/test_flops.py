"""The model FLOPs of a step, against those of the step as it is traced."""

import types

import jax
import jax.numpy as jnp
import pytest

from glm5_jax.experts import BLOCK_LOOP
from glm5_jax.info import describe
from glm5_jax.model import Glm5
from glm5_jax.params import abstract, leaves_by_path
from glm5_jax.places import Places
from glm5_jax.plan.chips import CHIPS
from glm5_jax.plan.costs import count
from glm5_jax.presets import load_preset
from glm5_jax.topk import HALVING_LOOP
from tests.tiny import SHARED, TINY, tiny_config
from train.flops import peak_flops, step_flops
from train.loss import Objective, loss
from train.state import assemble

BATCH, LENGTH = 2, 64
PAIRS = LENGTH * LENGTH  # of query and token in a row, which masked products compute in full
# 8 blocks of 32 rows, filled by 128 tokens that choose 2 of 8 experts evenly; halving multiplies
# nothing.
LOOPS = {BLOCK_LOOP: 8, HALVING_LOOP: 0}


def objective(stage="dense", mtp_depth=0, index_weight=1.0, mtp_weight=0.3):
    return Objective(
        stage=stage, mtp_depth=mtp_depth, mtp_weight=mtp_weight, index_weight=index_weight
    )


def traced_flops(config, objective, *, backward):
    """All products of the loss as it is traced, or of its gradient; loops as often as they run."""
    attending = objective.attending(config)
    weights = leaves_by_path(abstract(Glm5(attending), jnp.float32))
    learnt = {path: spec for path, spec in weights.items() if objective.moves(path)}
    kept = {path: spec for path, spec in weights.items() if path not in learnt}
    places = Places.unpadded(BATCH, LENGTH)

    def function(learnt, kept, tokens_BT):
        return loss(assemble(attending, learnt | kept, "float32"), tokens_BT, places, objective)

    traced = jax.jit(jax.grad(function, has_aux=True) if backward else function).trace(
        learnt, kept, jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    )
    costs = count(traced.jaxpr, {}, loop_trips=LOOPS, platform="cpu")
    return sum(costs.flops.values())


def masked(config, attended):
    """What attention computes of tokens that are not attended to, in one pass forward."""
    return BATCH * config.num_layers * per_pair(config) * (PAIRS - attended)


def experts(config):
    """A layer's routed experts, forward; for the gradient they compute that again."""
    pairs = BATCH * LENGTH * config.moe.experts_per_token
    return 3 * 2 * config.dim * config.moe.ffn * pairs


def scores(config):
    """A layer's scores of attention, forward; a CPU computes them again for the gradient."""
    mla = config.mla
    return 2 * BATCH * mla.num_heads * (mla.nope_dim + mla.rope_dim) * PAIRS


def per_pair(config):
    mla = config.mla
    return 2 * mla.num_heads * (mla.nope_dim + mla.rope_dim + mla.value_dim)


def num_indexers(config):
    return sum(kind.indexer == "full" for kind in config.layers)


ALL = LENGTH * (LENGTH + 1) // 2  # each query sees itself and what is before
SOME = 8 * 9 // 2 + (LENGTH - 8) * 8  # and attends to 8 of them


def norms(config):
    """The gradients of all RMS norms, each of which is summed by two products."""
    mla = config.mla
    widths = config.num_layers * (2 * config.dim + mla.q_rank + mla.kv_rank) + config.dim
    return 2 * 2 * BATCH * LENGTH * widths


both = pytest.mark.parametrize("raw", [TINY, SHARED], ids=["full", "shared"])


@both
def test_a_dense_forward_pass_is_counted_exactly(raw):
    config = tiny_config(raw)
    traced = traced_flops(config, objective(), backward=False)
    # Index keys are traced wherever there is an indexer; the compiler drops what nobody reads.
    unread_keys = 2 * BATCH * LENGTH * config.indexer.head_dim * config.dim * num_indexers(config)
    counted = step_flops(config, objective(), BATCH, LENGTH) / 3
    assert counted + masked(config, ALL) + unread_keys == traced


@both
def test_a_dense_gradient_is_counted_exactly_but_for_what_it_computes_again(raw):
    config = tiny_config(raw)
    traced = traced_flops(config, objective(), backward=True)
    again = experts(config) * sum(kind.mlp == "moe" for kind in config.layers)
    again += scores(config) * config.num_layers
    counted = step_flops(config, objective(), BATCH, LENGTH)
    assert counted + 3 * masked(config, ALL) + again + norms(config) == traced


@both
def test_selecting_is_counted_exactly(raw):
    config, selects = tiny_config(raw), objective("sparse", index_weight=0.0)
    traced = traced_flops(config, selects, backward=False)
    # Attention has a gradient, and indexers that are not taught have none.
    dense = step_flops(config, objective(), BATCH, LENGTH)
    attention = dense - 3 * BATCH * config.num_layers * per_pair(config) * (ALL - SOME)
    indexers = step_flops(config, selects, BATCH, LENGTH) - attention
    # Scores of tokens that are not seen are computed too; heads are added up by no product.
    indexer = config.indexer
    surplus = 2 * indexer.num_heads * (indexer.head_dim * (PAIRS - ALL) - ALL)
    surplus *= BATCH * num_indexers(config)
    assert attention / 3 + indexers + masked(config, SOME) + surplus == traced


@both
@pytest.mark.parametrize(("stage", "passes"), [("warmup", 1), ("sparse", 3)])
def test_a_step_that_teaches_indexers_is_counted_closely(raw, stage, passes):
    """Within 15%, where indexers are most of the work: what is traced scores hidden tokens too,
    and in the stage sparse scores once to select and once to learn.
    """
    config, teaches = tiny_config(raw), objective(stage)
    traced = traced_flops(config, teaches, backward=True)
    expected = traced - passes * masked(config, ALL if stage == "warmup" else SOME)
    assert step_flops(config, teaches, BATCH, LENGTH) == pytest.approx(expected, rel=0.15)


def test_the_mtp_layer_counts_at_every_depth():
    config = tiny_config(TINY)
    none, once, twice = (step_flops(config, objective(mtp_depth=d), 1, LENGTH) for d in range(3))
    assert 0.95 < (twice - once) / (once - none) < 1  # a token less at each depth
    frozen = step_flops(config, objective(mtp_depth=1, mtp_weight=0.0), 1, LENGTH)
    assert frozen - none == pytest.approx((once - none) / 3)
    traced = traced_flops(config, objective(mtp_depth=2), backward=True)
    without = traced_flops(config, objective(), backward=True)
    again = experts(config) + scores(config)
    surplus = 2 * (3 * masked(config, ALL) / config.num_layers + again)
    # Rows that predict nothing are computed too: 3 in 2 x 64.
    assert BATCH * (twice - none) == pytest.approx(traced - without - surplus, rel=0.05)


def test_parts_are_what_one_finds_by_hand():
    config = tiny_config(TINY)
    one = step_flops(config, objective(), 1, 2)
    attention = 64 * (48 + 40) + 4 * 48 * 20 + 4 * 32 * 28 + 4 * 16 * 64  # weights
    dense, moe = 3 * 64 * 96, 64 * 8 + 3 * 3 * 64 * 32
    weights = 7 * attention + 3 * dense + 4 * moe
    pairs = 1 + 2  # the second token sees the first
    by_hand = 2 * 2 * weights + 2 * 7 * 4 * (12 + 8 + 16) * pairs + 2 * 1 * 64 * 97
    assert one == 3 * by_hand
    # A row that is no longer than topk has nothing to select.
    assert step_flops(config, objective("sparse", index_weight=0.0), 1, 2) == one


def test_a_large_model_takes_six_times_its_active_parameters():
    """Of a short row, whose attention is nothing beside its weights."""
    config = load_preset("glm-5").config
    active = describe(config)["active parameters"]
    flops = step_flops(config, objective(), 1, 64)
    indexers = config.num_layers * (32 * 128 * config.mla.q_rank + (128 + 32) * config.dim)
    assert flops == pytest.approx(6 * 64 * (active - indexers), rel=0.01)


@pytest.mark.parametrize(
    ("kind", "dtype", "expected"),
    [
        ("TPU v5 lite", "bfloat16", CHIPS["v5e"].flops["bfloat16"]),
        ("TPU v4", "bfloat16", CHIPS["v4"].flops["bfloat16"]),
        ("TPU7x", "bfloat16", CHIPS["v7"].flops["bfloat16"] / 2),
        ("NVIDIA H200", "float32", CHIPS["h200"].flops["float32"]),
        ("NVIDIA GH200 480GB", "bfloat16", None),
        ("NVIDIA H100 PCIe", "bfloat16", None),
        ("cpu", "float32", None),
    ],
)
def test_peaks_are_those_of_the_device_that_jax_names(kind, dtype, expected):
    assert peak_flops(types.SimpleNamespace(device_kind=kind), dtype) == expected
