"""`glm5 plan` against sums by hand, on virtual CPU devices and, where libtpu is, for TPUs."""

import importlib.util
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from glm5_jax.__main__ import main
from glm5_jax.collectives import BATCH, MESH_AXES, standing_in_for, total
from glm5_jax.dispatch import dispatch, expected_blocks
from glm5_jax.exchange import apply_experts
from glm5_jax.experts import ExpertList, Experts
from glm5_jax.mesh import make_mesh
from glm5_jax.model import Glm5
from glm5_jax.params import abstract, leaf_dtype, leaves_by_path
from glm5_jax.plan.chips import CHIPS
from glm5_jax.plan.topology import Topology, find_topology
from glm5_jax.presets import load_preset
from glm5_jax.sharding import DECODE, TRAIN, Partition

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, which compiles for TPUs, is not installed: pip install '.[tpu]'",
)


def plan(capsys, *arguments):
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def weight_bytes(preset, rules, mesh, dtype):
    """What a device keeps of the weights, leaf by leaf."""
    return sum(
        spec.size
        * leaf_dtype(spec, dtype).itemsize
        // math.prod(mesh[axis] for axes in rules.divisors(spec) for axis in axes)
        for spec in leaves_by_path(Glm5(load_preset(preset).config)).values()
    )


@pytest.mark.standard_promotion
@pytest.mark.parametrize("job", ["decode", "prefill", "train"])
def test_memory_and_work_are_those_of_the_model(capsys, job):
    work = ["--batch", "16", "--context", "512"]
    found = plan(capsys, "demo", "--topology", "h100:8", "--job", job, *work)
    rules = TRAIN if job == "train" else DECODE
    memory = found["memory"]
    assert math.prod(found["mesh"].values()) == 8
    expected = weight_bytes("demo", rules, found["mesh"], "float32")
    assert memory["weights"] == expected == sum(found["weights"].values())
    assert found["fits"] and memory["arguments"] <= found["compiled"]["peak"]
    temporaries = found["compiled"]["peak"] - memory["arguments"]
    assert found["compiled"]["temporaries"] == temporaries
    if job == "train":  # two numbers for every weight that is moved, and a few counters
        moments = memory["optimizer"] / expected
        assert 1.9 < moments < 2.0
    else:
        config = load_preset("demo").config
        rows = config.num_layers * config.mla.row_dim
        keys = sum(kind.indexer == "full" for kind in config.layers) * config.indexer.head_dim
        assert memory["cache"] == 16 * 512 * 4 * (rows + keys) / 8
    # Two per weight and token are the least, three times that with gradients.
    active = 2 * found["tokens"] / 8 * (3 if job == "train" else 1)
    flops = sum(found["flops"].values())
    assert active * 1e5 < flops < active * 1e7
    assert found["seconds"][found["bound"]] == max(found["seconds"].values()) > 0
    rate = found["tokens"] / max(found["seconds"].values()) / 8
    assert found["tokens_per_second_per_chip"] == pytest.approx(rate)


@pytest.mark.standard_promotion
@pytest.mark.parametrize(("scheme", "bits"), [("float8", 8), ("int8", 8), ("int4", 4)])
def test_weights_in_few_bits_take_what_their_values_and_scales_do(capsys, scheme, bits):
    work = ["--batch", "16", "--context", "512", "--topology", "h100:8", "--dtype", "bfloat16"]
    work += ["--mesh", "data=1,expert=8,model=1"]  # which leaves blocks as large as they are
    plain = plan(capsys, "demo", *work)
    found = plan(capsys, "demo", *work, "--weights", scheme)
    blueprint = Glm5(load_preset("demo").config)
    expected = wide = 0.0
    for path, spec in leaves_by_path(blueprint).items():
        if ".experts." in f".{path}.":
            *_, rows, columns = spec.shape
            block = math.gcd(128, rows), math.gcd(128, columns)
            block = {"float8": block, "int8": (1, columns), "int4": (1, block[1])}[scheme]
            expected += spec.size * bits / 8 + 4 * spec.size / math.prod(block)
            wide += spec.size * 2
    assert plain["weights"]["routed experts"] == wide / 8
    assert found["weights"]["routed experts"] == expected / 8
    assert found["weights"]["embedding"] == plain["weights"]["embedding"]
    assert found["flops"] == plain["flops"]
    assert found["hbm_bytes"] < plain["hbm_bytes"]


def test_gpus_of_several_hosts_meet_over_the_network():
    devices = [types.SimpleNamespace(id=number) for number in range(16)]
    chip = CHIPS["h100"]
    topology = Topology("h100:16", chip, devices, "cuda")
    assert topology.bandwidth(devices[8:]) == chip.link_bandwidth
    assert topology.bandwidth(devices[::8]) == chip.network_bandwidth


@pytest.mark.standard_promotion
def test_temporaries_of_training_hold_the_gradients(capsys):
    work = ["--job", "train", "--batch", "8", "--context", "256"]
    found = plan(capsys, "demo", "--topology", "h100:1", *work)
    assert found["compiled"]["temporaries"] > found["memory"]["weights"]


def test_a_context_need_not_be_a_multiple_of_anything(capsys):
    mesh = ["--mesh", "data=2,model=4", "--batch", "16", "--context", "501"]
    assert plan(capsys, "demo", "--topology", "h100:8", *mesh)["fits"]


def test_a_plan_that_cannot_fit_is_a_verdict_and_not_compiled(capsys):
    arguments = ["plan", "glm-5", "--topology", "h100:8", "--batch", "8", "--context", "4096"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "does not fit" in captured.out and "too much" in captured.out
    assert "nothing is compiled" in captured.err


def test_a_search_ranks_meshes_and_compiles_the_best(capsys):
    work = ["--batch", "16", "--context", "512"]
    found = plan(capsys, "demo", "--topology", "h100:8", "--search", "--compile", "1", *work)
    plans = found["plans"]
    times = [max(each["seconds"].values()) for each in plans]
    assert len(plans) > 1 and times == sorted(times)
    assert [each["compiled"] is not None for each in plans] == [True] + [False] * (len(plans) - 1)
    assert len({tuple(each["mesh"].values()) for each in plans}) == len(plans)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["glm-6", "--topology", "h100:8"], "glm-6: is neither a directory nor one of"),
        (["demo", "--topology", "v9:2x2"], "with one of the chips v4"),
        (["demo", "--topology", "h100:0"], "expected CHIP:AxB"),
        (["demo", "--topology", "h100:8", "--job", "fly"], "expected one of decode, prefill"),
        (["demo", "--topology", "h100:8", "--mesh", "data=3"], "is for 3 devices, expected 8"),
        (["demo", "--topology", "h100:8", "--mesh", "data=2,datum=4"], "is not an axis"),
        (["demo", "--topology", "h100:8", "--mesh", "data=2,data=4"], "given twice"),
        (["demo", "--topology", "h100:8", "--batch", "9"], "does not divide batch size 9"),
        (["demo", "--topology", "h100:8", "--mesh", "data=" + "9" * 400], "is not an axis"),
        (["demo", "--topology", "h100:8", "--context", "1000000"], "--context is 1000000"),
        (["demo", "--topology", "h100:8", "--search", "--mesh", "data=8"], "expected none"),
    ],
)
def test_wrong_input_is_one_line(capsys, arguments, named):
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("glm5: error: ") and named in error


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_expected_blocks_are_the_mean_over_random_routings(platform):
    rng = np.random.default_rng(0)
    for tokens, choices, experts, kept in ((3, 2, 64, 16), (40, 2, 8, 8), (500, 4, 16, 4)):
        used = []
        with standing_in_for(platform):
            for _ in range(200):
                chosen = np.argsort(rng.random((tokens, experts)), axis=1)[:, :choices]
                used.append(int(dispatch(chosen, kept, chosen.size // experts).num_used))
            expected = expected_blocks(tokens * choices, experts, kept)
        assert np.mean(used) == pytest.approx(expected, rel=0.1)


@needs_libtpu
@pytest.mark.slow
def test_decoding_of_the_full_size_compiles_for_a_tpu_pod_and_fits(capsys):
    found = plan(capsys, "glm-5", "--topology", "v6e:16x16", "--job", "decode")
    assert found["mesh"] == {"data": 1, "expert": 32, "model": 8} and found["fits"]
    expected = weight_bytes("glm-5", DECODE, found["mesh"], "bfloat16")
    assert found["memory"]["weights"] == expected == sum(found["weights"].values())
    # 109,824 bytes a token, over 256 chips
    cache = 256 * 32768 * 109_824 / 256
    assert found["memory"]["cache"] == pytest.approx(cache, rel=1e-6)
    assert found["memory"]["arguments"] < found["compiled"]["peak"]
    assert found["compiled"]["peak"] < found["memory"]["limit"] == CHIPS["v6e"].usable_hbm_bytes


@needs_libtpu
def test_a_topology_that_libtpu_does_not_know_is_refused_with_the_nearest(capsys):
    assert main(["plan", "glm-5", "--topology", "v6e:3x5"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "expected for instance v6e:4x4 or v6e:2x4" in error


@needs_libtpu
def test_tokens_are_sent_to_chosen_experts_only_on_tpus():
    """There the exchange and its gradient compile to ragged exchanges, on CPUs to gathering."""
    config = load_preset("bench").config
    blueprint, rows = Experts(config), P(BATCH)

    def step(experts, x, chosen, gates):
        def loss(experts, x, gates):
            num_experts = config.moe.num_experts
            held = ExpertList.of(experts)
            y, _ = apply_experts(held, x, chosen, gates, num_experts=num_experts, axes=BATCH)
            return total(jnp.sum(y.astype(jnp.float32) ** 2), MESH_AXES)

        return jax.grad(loss, argnums=(0, 1, 2))(experts, x, gates)

    counts = {}
    for platform, devices in (
        ("tpu", find_topology("v5e:2x4").devices),
        ("cpu", jax.devices("cpu")),
    ):
        mesh = make_mesh({"data": 1, "expert": 8, "model": 1}, devices)
        part = Partition(mesh, DECODE)
        sharding = jax.NamedSharding(mesh, rows)
        shapes = [
            jax.ShapeDtypeStruct((8, 16, width), dtype, sharding=sharding)
            for width, dtype in ((512, jnp.bfloat16), (4, jnp.int32), (4, jnp.float32))
        ]
        specs = part.specs(blueprint)
        inner = part.on_shards(step, (specs, rows, rows, rows), (specs, rows, rows))
        weights = abstract(blueprint, jnp.bfloat16, part.sharding)
        hlo = jax.jit(inner).lower(weights, *shapes).compile().as_text()
        counts[platform] = hlo.count("ragged-all-to-all(")
    assert counts["tpu"] >= 6 and counts["cpu"] == 0
