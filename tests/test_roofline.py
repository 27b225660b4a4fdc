"""The least that a step takes, and what its program does: sums by hand, and properties."""

import itertools

import jax
import numpy as np
import pytest

from benchmarks import primitives, roofline
from benchmarks.minimum import least_of_decoding, touched, weights_as_laid_out
from glm5_jax.experts import BLOCK_LOOP
from glm5_jax.info import describe
from glm5_jax.plan.chips import CHIPS
from glm5_jax.plan.costs import count
from glm5_jax.presets import load_preset
from tests.tiny import SHARED, TINY, tiny_config

# A tiny layer's projections, by the sizes in TINY.
ATTENTION = 64 * (48 + 40) + 4 * 48 * 20 + 4 * 32 * 28 + 4 * 16 * 64
INDEXER, GATES = 16 * (8 * 48 + 64), 8 * 64
ONE = {"data": 1, "expert": 1, "model": 1}


@pytest.mark.parametrize(("raw", "num_full"), [(TINY, 7), (SHARED, 4)], ids=["full", "shared"])
def test_the_least_is_what_one_finds_by_hand(raw, num_full):
    least = least_of_decoding(tiny_config(raw), 1, 100, float8=False)
    matrices = 7 * ATTENTION + num_full * INDEXER + 3 * 3 * 64 * 96 + 4 * (2 + 1) * 3 * 64 * 32
    others = num_full * GATES + 4 * 8 * 64 + 97 * 64  # gates, routers, head
    small = 7 * (2 * 64 + 48 + 32) + num_full * 2 * 16 + 4 * 8 * 2 + 64 + 64
    assert least.weights == 2 * (matrices + others + small)
    assert least.index_keys == 2 * num_full * 100 * 16
    assert least.rows == 2 * 7 * 8 * 40
    core = 7 * 4 * 8 * (40 + 32) + num_full * 8 * 100 * (16 + 1)
    assert least.flops == 2 * (matrices + others + core)
    in_float8 = least_of_decoding(tiny_config(raw), 1, 100, float8=True)
    assert in_float8.weights == pytest.approx(least.weights - matrices * (1 - 4 / 128**2))


def test_the_least_of_the_full_model_is_its_active_parameters():
    config = load_preset("glm-5").config
    least = least_of_decoding(config, 1, 2048, float8=False)
    active, norms = describe(config)["active parameters"], 0.0001
    assert least.weights == pytest.approx(2 * active, rel=norms)
    core = 78 * 64 * 2048 * (576 + 512)
    assert least.flops == 2 * (40_831_942_656 + core)  # matrices of a token, head included
    assert least.index_keys == 0  # there is nothing to choose


def test_touched_experts_are_the_mean_over_all_choices():
    choices = list(itertools.combinations(range(4), 2))
    sizes = [len(set().union(*rows)) for rows in itertools.product(choices, repeat=3)]
    assert touched(4, 2, 3) == pytest.approx(np.mean(sizes))
    assert touched(256, 8, 1) == pytest.approx(8)


@pytest.mark.parametrize("float8", [False, True])
def test_what_one_device_keeps_is_what_it_reads_at_least(float8):
    config = load_preset("glm-5.2").config
    for batch in (1, 32):
        least = least_of_decoding(config, batch, 4096, float8=float8).weights
        held = weights_as_laid_out(config, ONE, batch, float8=float8)
        assert held == pytest.approx(least, rel=1e-12)
        divided = ONE | {"expert": 4, "model": 8}
        everywhere = 32 * weights_as_laid_out(config, divided, batch, float8=float8)
        assert everywhere > 1.1 * least


def test_a_step_is_bound_by_what_takes_longest():
    config, chip = load_preset("glm-5").config, CHIPS["v5p"]
    least = least_of_decoding(config, 1, 4096, float8=False)
    assert least.seconds(chip, 16) == least.bytes / chip.hbm_bandwidth / 16
    busy = least._replace(flops=1e18)
    assert busy.seconds(chip, 16) == 1e18 / chip.flops["bfloat16"] / 16


@pytest.mark.standard_promotion
def test_no_traced_step_takes_less_than_the_least():
    row = roofline.compare(roofline.Step("demo", "h200:8", 16, 512, None))
    assert row["counted"]["bytes"] > row["least"]["bytes"]
    assert sum(row["counted"]["flops"].values()) > row["least"]["flops"]
    assert row["times the least"] > 1 and row["fits"]
    _, _, head, rule, cells, *_ = roofline._chip_lines([row])
    assert head.count("|") == rule.count("|") == cells.count("|")


def test_shares_are_of_the_nearer_ceiling():
    def row(name, seconds, flops, num_bytes, kind="primitive"):
        sizes = {"seconds": seconds, "flops": flops, "bytes": num_bytes}
        return {"name": name, "dtype": "float32", "kind": kind, **sizes}

    tops = [row("product", 2.0, 200.0, 0.0, "ceiling"), row("slow", 1.0, 0.0, 4.0, "ceiling")]
    tops += [row("fast", 1.0, 0.0, 10.0, "ceiling")]
    rows = [*tops, row("busy", 4.0, 100.0, 10.0), row("waiting", 4.0, 100.0, 20.0)]
    *_, busy, waiting = primitives.with_shares(rows)
    assert (busy["bound"], busy["share"]) == ("FLOPs", 0.25)
    assert (waiting["bound"], waiting["share"]) == ("memory", 0.5)
    lines = list(roofline._machine_lines([*tops, busy, waiting]))
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def traced(primitive, **loops):
    jaxpr = jax.make_jaxpr(primitive.call)(0)
    return sum(count(jaxpr, {}, loop_trips=loops, platform="cpu").flops.values())


def test_primitives_are_credited_with_the_work_that_they_do():
    config = tiny_config()
    attention = primitives.attention(config, "float32", 2, 1, 128)
    surplus = 2 * 2 * 4 * 8 * 8  # of 2 queries, 4 heads, 8 tokens: the rotary part is summed, too
    assert traced(attention) == attention.flops + surplus
    out_BTD = attention.call(0)
    assert np.isfinite(out_BTD).all() and not np.allclose(out_BTD, attention.call(1))
    experts = primitives.experts(config, "float32", 1)
    assert traced(experts, **{BLOCK_LOOP: 2}) == experts.flops == 2 * 2 * 3 * 64 * 32
    assert experts.bytes == 4 * (2 * 3 * 64 * 32 + 2 * 64)
    indexer = primitives.indexer(config, "float32", 2, 1, 128)
    assert indexer.flops == 2 * 2 * (8 * (16 * 48 + 64) + 128 * 8 * 17)
    assert indexer.call(0).index_BTK.shape == (2, 1, 8)
