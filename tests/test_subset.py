"""A part of a checkpoint is the model that its weights, put together by hand, make."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from convert.__main__ import main
from glm5_jax.load import load_model
from glm5_jax.model import Glm5, forward, logits, predict_ahead
from glm5_jax.params import count_params, leaves_by_path
from glm5_jax.places import Places
from glm5_jax.presets import load_preset
from tests.subsets import DENSE, FULL, SAME, SPARSE, by_hand, small
from tests.test_exports import BLOCKS, fused
from tests.tiny import (
    GROUPED,
    SHARED,
    TINY,
    TOKENS,
    build_model,
    float8_weights,
    random_weights,
    tiny_config,
    write_published,
)

# What is asked for of which checkpoint, the layers that are kept, and the config that comes of it.
CASES = {
    "with MTP": (
        TINY,
        ["--layers", "0,3,5,7", "--experts", "4"],
        [0, 3, 5, 7],
        small(TINY, [DENSE, SPARSE, SPARSE], [FULL] * 3, n_routed_experts=4),
    ),
    "shared selection": (
        SHARED,
        ["--layers", "2-4,6"],
        [2, 3, 4, 6],
        small(
            SHARED,
            [DENSE, SPARSE, SPARSE, SPARSE],
            [FULL, SAME, SAME, FULL],
            num_nextn_predict_layers=0,
        ),
    ),
    "groups of experts": (
        GROUPED,
        ["--experts", "4", "--layers", "0-4, 7"],
        [0, 1, 2, 3, 4, 7],
        small(
            GROUPED,
            [DENSE, SPARSE, SPARSE, DENSE, SPARSE],
            [FULL, SAME, FULL, FULL, SAME],
            n_routed_experts=4,
            n_group=2,
        ),
    ),
    "one group of experts": (
        GROUPED,
        ["--experts", "2"],
        list(range(8)),
        GROUPED | {"n_routed_experts": 2, "n_group": 1, "topk_group": 1},
    ),
    "one expert": (
        TINY,
        ["--experts", "1"],
        list(range(8)),
        TINY | {"n_routed_experts": 1, "num_experts_per_tok": 1},
    ),
    "dense layers": (
        TINY,
        ["--layers", "1"],
        [1],
        small(TINY, [DENSE], [FULL], num_nextn_predict_layers=0),
    ),
}


@jax.jit
def outputs(model):
    """Logits, and those of the MTP layer, if there is one."""
    tokens_BT = jnp.asarray([TOKENS])
    places = Places.unpadded(*tokens_BT.shape)
    hidden_BTD = forward(model, tokens_BT, places).hidden_BTD
    found = [logits(model, hidden_BTD)]
    if model.mtp is not None:
        ((ahead_BTD, _),) = predict_ahead(model, hidden_BTD, tokens_BT, places, depth=1)
        found.append(logits(model, ahead_BTD))
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_subset_is_the_model_that_its_weights_make_by_hand(tmp_path, case):
    raw, options, kept, expected_raw = CASES[case]
    weights = random_weights(raw)
    source = write_published(tmp_path / "source", raw, weights, num_shards=3)
    native = tmp_path / "native"
    assert main(["from-hf", str(source), str(native), *options]) == 0
    assert json.loads((native / "config.json").read_text()) == expected_raw
    model, expected = (
        load_model(native),
        build_model(expected_raw, by_hand(weights, kept, expected_raw)),
    )
    assert model.config == expected.config
    leaves = leaves_by_path(expected)
    for leaf, array in leaves_by_path(model).items():
        np.testing.assert_array_equal(array, leaves[leaf])
    for actual, wanted in zip(outputs(model), outputs(expected), strict=True):
        assert np.isfinite(actual).all()
        np.testing.assert_array_equal(actual, wanted)
    assert main(["verify", str(native), "--against", str(source), *options]) == 0


@pytest.mark.parametrize("case", ["shared selection", "groups of experts"])
def test_transformers_computes_the_same_with_what_is_converted_back(tmp_path, case):
    torch = pytest.importorskip("torch", reason="PyTorch, the reference, is not installed")
    hf = pytest.importorskip("tests.reference.hf", reason="transformers is not installed")
    raw, options, kept, expected_raw = CASES[case]
    weights = random_weights(raw, seed=3)
    source = write_published(tmp_path / "source", raw | hf.HF_LATENT_EPS, weights)
    assert main(["from-hf", str(source), str(tmp_path / "native"), *options]) == 0
    assert main(["to-hf", str(tmp_path / "native"), str(tmp_path / "back")]) == 0
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == expected_raw | hf.HF_LATENT_EPS
    with safe_open(tmp_path / "back" / "model.safetensors", framework="np") as file:
        back = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    with torch.no_grad():
        wanted = hf.hf_model(expected_raw, back)(torch.tensor([TOKENS])).logits.numpy()
    np.testing.assert_allclose(outputs(load_model(tmp_path / "native"))[0], wanted, atol=1e-4)


KEYS = {  # keys of the source beside its sizes, and what they become
    "count and frequency": (
        {"first_k_dense_replace": 3, "index_topk_freq": 4, "index_skip_topk_offset": 3},
        {"first_k_dense_replace": 2},
    ),
    "pattern": (
        {"first_k_dense_replace": 3, "index_topk_pattern": "FFFSSSF"},
        {"first_k_dense_replace": 2},
    ),
    "lists": (
        {
            "mlp_layer_types": [DENSE] * 3 + [SPARSE] * 4,
            "indexer_types": [FULL] * 3 + [SAME] * 3 + [FULL],
            "layer_types": ["indexed_attention"] * 7,
            "num_local_experts": 8,
            "first_k_dense_replace": 3,
            "moe_layer_freq": 1,
        },
        {
            "layer_types": ["indexed_attention"] * 5,
            "num_local_experts": 4,
            "first_k_dense_replace": 2,
            "moe_layer_freq": 1,
        },
    ),
}


@pytest.mark.parametrize("form", KEYS)
def test_every_key_that_counts_layers_or_experts_is_right(tmp_path, form):
    given, expected = KEYS[form]
    base = {k: v for k, v in TINY.items() if k not in ("mlp_layer_types", "indexer_types")}
    source = write_published(tmp_path / "source", base | given, random_weights(SHARED))
    options = ["--layers", "0,2-4,6", "--experts", "4"]
    assert main(["from-hf", str(source), str(tmp_path / "native"), *options]) == 0
    assert json.loads((tmp_path / "native" / "config.json").read_text()) == base | expected | {
        "num_hidden_layers": 5,
        "num_nextn_predict_layers": 0,
        "n_routed_experts": 4,
        "mlp_layer_types": [DENSE, DENSE, SPARSE, SPARSE, SPARSE],
        "indexer_types": [FULL, FULL, SAME, SAME, FULL],
    }


def test_float8_fused_experts_and_prefixes_can_be_taken_a_part_of(tmp_path):
    raw, options = BLOCKS, ["--layers", "0,4,7", "--experts", "3"]
    weights, values = float8_weights(random_weights(raw))
    renamed = {f"module.{name}": w for name, w in fused(weights).items()}
    source = write_published(tmp_path / "source", raw, renamed, num_shards=2)
    assert main(["from-hf", str(source), str(tmp_path / "native"), *options]) == 0
    expected_raw = small(raw, [DENSE, SPARSE], [FULL] * 2, n_routed_experts=3)
    expected = leaves_by_path(build_model(expected_raw, by_hand(values, [0, 4, 7], expected_raw)))
    for leaf, array in leaves_by_path(load_model(tmp_path / "native")).items():
        np.testing.assert_array_equal(array, expected[leaf])
    assert main(["verify", str(tmp_path / "native"), "--against", str(source), *options]) == 0


def test_float8_is_kept_with_its_scales_and_its_config(tmp_path):
    left = [
        "lm_head",
        "model.layers.0.mlp",
        "model.layers.3.mlp.gate",
        "model.layers.4",
        "layers.7.x",
    ]
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
    raw = BLOCKS | {"quantization_config": quantization | {"modules_to_not_convert": left}}
    weights, _ = float8_weights(random_weights(raw))
    source = write_published(tmp_path / "source", raw, fused(weights), num_shards=2)
    options, native = ["--layers", "0,4,7", "--experts", "3"], tmp_path / "native"
    assert main(["from-hf", str(source), str(native), "--float8-as", "float8", *options]) == 0
    kept = ["lm_head", "model.layers.0.mlp", "model.layers.1", "layers.2.x"]
    config = json.loads((native / "config.json").read_text())
    assert config["quantization_config"] == quantization | {"modules_to_not_convert": kept}
    small_raw = small(raw, [DENSE, SPARSE], [FULL] * 2, n_routed_experts=3)
    by_itself = by_hand(weights, [0, 4, 7], small_raw)
    plain = write_published(tmp_path / "plain", small_raw, by_itself)
    assert main(["from-hf", str(plain), str(tmp_path / "whole"), "--float8-as", "float8"]) == 0
    assert main(["diff", str(native), str(tmp_path / "whole")]) == 0
    assert main(["verify", str(native), "--against", str(source), *options]) == 0


@pytest.mark.parametrize("preset", ["glm-5", "glm-5.2"])
def test_a_part_of_a_checkpoint_of_full_size_is_planned_from_headers(tmp_path, capsys, preset):
    source, options = str(tmp_path / "x"), ["--layers", "0-3,78", "--experts", "8"]
    if preset == "glm-5.2":
        options[1] = "0-6,78"
    assert main(["synthesize", source, "--config", preset, "--holes"]) == 0
    capsys.readouterr()
    assert main(["from-hf", source, str(tmp_path / "y"), *options, "--plan"]) == 0
    planned = capsys.readouterr().out
    given = {k: v for k, v in load_preset(preset).raw.items() if not k.startswith("index_topk_")}
    mlp, indexer = [DENSE] * 3 + [SPARSE], [FULL] * 4
    if preset == "glm-5.2":
        mlp, indexer = [DENSE] * 3 + [SPARSE] * 4, [FULL] * 3 + [SAME] * 3 + [FULL]
    raw = small(given, mlp, indexer, n_routed_experts=8)
    num_moe = mlp.count(SPARSE) + 1
    # Two bytes a weight, and two more of the routers' biases.
    size = 2 * count_params(Glm5(tiny_config(raw))) + 2 * 8 * num_moe
    assert f"{size:,} bytes to read" in planned and f"{size:,} bytes to write" in planned
    assert int(re.search(r"in (\d+) shards", planned)[1]) < 10  # of 282
