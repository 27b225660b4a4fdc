"""The least that a step takes, and what its program does: sums by hand, and properties."""

import itertools
import json
import math
from importlib.util import find_spec

import jax
import numpy as np
import pytest

from benchmarks import claims, passes, primitives, roofline
from benchmarks.claims import Claim
from benchmarks.minimum import least_of_decoding, touched, weights_as_laid_out
from benchmarks.passes import Counter, Pass, flops, formed_per_token, parts, request
from glm5_jax.errors import InputError
from glm5_jax.experts import BLOCK_LOOP
from glm5_jax.info import describe
from glm5_jax.mesh import make_mesh
from glm5_jax.plan.chips import CHIPS
from glm5_jax.plan.costs import count
from glm5_jax.presets import load_preset
from glm5_jax.sharding import DECODE, Partition, on_one_device
from tests.tiny import SHARED, TINY, tiny_config

# A tiny layer's projections, by the sizes in TINY.
ATTENTION = 64 * (48 + 40) + 4 * 48 * 20 + 4 * 32 * 28 + 4 * 16 * 64
INDEXER, GATES = 16 * (8 * 48 + 64), 8 * 64
ONE = {"data": 1, "expert": 1, "model": 1}


@pytest.fixture
def counter():
    return Counter(tiny_config(), on_one_device(), "cpu")


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


def test_copies_outside_of_loops_are_found():
    inside = "%body (x: f32[8]) -> f32[8] {\n  %copy.9 = f32[8]{0} copy(%x)\n}\n"
    lines = ["ENTRY %main (x: u16[3,4]) -> u16[3,4] {", "  %copy.1 = u16[3,4]{0,1:T(8)} copy(%x)"]
    lines += ["  %wide = f8e4m3fn[5]{0} copy(%y)", "  %z = f32[8]{0} add(%p, %q)", "}", ""]
    assert roofline.copied_bytes(inside + "\n".join(lines)) == 2 * (3 * 4 * 2 + 5)


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
    return flops(count(jaxpr, {}, loop_trips=loops, platform="cpu"))


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


def test_a_pass_is_told_apart_exactly(counter):
    found = parts(counter, Pass(1, 128))
    per_pair = 2 * 7 * 4 * (40 + 40)  # absorbed, with the rotary part summed
    assert found.attention == pytest.approx(8 * per_pair)
    assert found.attention_to_all == pytest.approx(128 * per_pair)
    assert found.cut == pytest.approx(1 - 8 / 128)
    assert found.indexers == 2 * 7 * (8 * 16 * 48 + 8 * 64 + 128 * 8 * 17)
    least = least_of_decoding(counter.config, 1, 128, float8=False).flops
    whole = found.attention + found.indexers + found.rest
    assert whole == pytest.approx(least + 8 * 2 * 7 * 4 * 8)


def test_attention_to_all_that_is_masked_is_noticed(counter, monkeypatch):
    monkeypatch.setattr("glm5_jax.attention.GATHER_COST", 1e9)
    with pytest.raises(InputError, match="expected work that grows in proportion"):
        parts(counter, Pass(1, 128))


def test_a_request_is_the_sum_of_its_passes(counter, monkeypatch):
    monkeypatch.setattr(passes, "PORTION", 32)
    every = [flops(counter.costs(Pass(1, at), "all")) for at in range(125, 129)]
    portions = [flops(counter.costs(Pass(32, at), "all")) for at in (32, 64, 96)]
    found = request(counter, "all", 128, 4, 32)
    assert found.generating == pytest.approx(sum(every))
    formed = 2 * 7 * 4 * 32 * (12 + 16)  # of a token's row, keys and values of 4 heads
    assert formed_per_token(counter, 128) == pytest.approx(formed)
    assert found.reading == pytest.approx(sum(portions) - formed * (32 + 64))
    assert found.whole == found.reading + found.generating
    assert request(counter, "selecting", 128, 4, 32).generating < found.generating


@pytest.mark.skipif(not find_spec("libtpu"), reason="needs libtpu")
def test_the_full_model_can_be_taken_apart_by_what_it_selects():
    mesh = make_mesh(ONE, claims._devices()[:1])
    counter = Counter(load_preset("glm-5").config, Partition(mesh, DECODE), "tpu")
    assert 0.9 < parts(counter, Pass(512, 131_072)).cut < 1


def test_claims_that_do_not_hold_are_said_not_to(counter, monkeypatch):
    for module in (passes, claims):
        monkeypatch.setattr(module, "PORTION", 32)
    found = list(claims.claims("tiny", counter, 128, 4, 32))
    cut, *_, experts = [each for each in found if each.holds is not None]
    assert cut.counted == pytest.approx(1 - 8 / 128) and cut.holds is False
    assert experts.counted == pytest.approx(2 / 8) and experts.holds is False
    assert all(math.isfinite(each.counted) for each in found)


@pytest.mark.parametrize(("counted", "status"), [(0.98, 0), (0.979, 1)])
def test_a_claim_that_does_not_hold_is_the_exit_status(tmp_path, monkeypatch, counted, status):
    made = [Claim("tiny", "cut", counted, least=0.98), Claim("tiny", "to know", 0.0)]
    monkeypatch.setattr(claims, "_PRESETS", ("demo",))
    monkeypatch.setattr(claims, "claims", lambda preset, counter: made)
    monkeypatch.setattr(claims, "_devices", lambda: jax.devices("cpu"))
    monkeypatch.setattr(claims, "_PACKAGES", ())
    assert claims.main(["--results", str(tmp_path)]) == status
    rows = json.loads((tmp_path / "claims.json").read_text())["rows"]
    assert [row["holds"] for row in rows] == [status == 0, None]
    assert ("**no**" in (tmp_path / "claims.md").read_text()) == bool(status)
