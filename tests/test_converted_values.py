"""Weights that become others on their way in, and those that cannot."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from convert.__main__ import main
from convert.finite import num_not_finite
from glm5_jax.checkpoint import restore_checkpoint
from glm5_jax.load import load_model
from glm5_jax.params import leaves_by_path
from tests.tiny import (
    TINY,
    WIDE,
    build_model,
    float8_weights,
    random_weights,
    write_published,
)


@pytest.mark.parametrize("option", [[], ["--float8-as", "float32"]])
def test_float8_is_multiplied_out(tmp_path, option):
    raw = WIDE | {"dtype": "bfloat16"}
    published, values = float8_weights(random_weights(raw))
    published = {
        n: w.astype(jnp.bfloat16) if w.dtype == np.float32 and "scale" not in n else w
        for n, w in published.items()
    }
    raw |= {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    source = write_published(tmp_path / "source", raw, published, num_shards=2)
    assert main(["from-hf", str(source), str(tmp_path / "native"), *option]) == 0
    dtype = jnp.float32 if option else jnp.bfloat16
    loaded = leaves_by_path(load_model(tmp_path / "native", jnp.float32))
    expected = leaves_by_path(build_model(raw, {n: w.astype(dtype) for n, w in values.items()}))
    quantized = [leaf for leaf in loaded if "q_up" in leaf or "kv_down" in leaf or ".gate" in leaf]
    assert len(quantized) > 5
    for leaf in quantized:
        np.testing.assert_array_equal(loaded[leaf], expected[leaf].astype(jnp.float32))
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    assert "quantization_config" not in config


def test_copies_in_the_mtp_layer_must_be_copies(tmp_path, capsys):
    weights = random_weights(TINY)
    copy = {"model.layers.7.shared_head.head.weight": weights["lm_head.weight"].copy()}
    source = write_published(tmp_path / "good", TINY, weights | copy)
    assert main(["from-hf", str(source), str(tmp_path / "native")]) == 0
    copy["model.layers.7.shared_head.head.weight"][50, 3] += 1e-3
    source = write_published(tmp_path / "bad", TINY, weights | copy)
    assert main(["from-hf", str(source), str(tmp_path / "other")]) == 2
    assert "shared_head.head.weight differs from lm_head.weight" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("asked", "found"), [("float32", "float32"), ("float8", "bfloat16")])
def test_a_leaf_of_float8_and_others_takes_the_wider_dtype(tmp_path, asked, found):
    raw = WIDE | {"dtype": "bfloat16"}
    published, _ = float8_weights(random_weights(raw))
    name = "model.layers.4.mlp.experts.1.up_proj.weight"
    del published[name + "_scale_inv"]
    published[name] = random_weights(raw)[name].astype(jnp.bfloat16)
    source = write_published(tmp_path / "source", raw, published)
    assert main(["from-hf", str(source), str(tmp_path / "a"), "--float8-as", asked]) == 0
    up = leaves_by_path(restore_checkpoint(tmp_path / "a"))["segments.1.experts.0.up"]
    assert up.dtype == found
    # The segment's layers are the model's from 3 on.
    np.testing.assert_array_equal(up[1, 1], published[name].astype(found))


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0])
def test_a_senseless_scale_is_named(tmp_path, capsys, scale):
    published, _ = float8_weights(random_weights(WIDE))
    name = "model.layers.1.self_attn.q_b_proj.weight_scale_inv"
    published[name][0, 1] = scale
    source = write_published(tmp_path / "source", WIDE, published)
    assert main(["from-hf", str(source), str(tmp_path / "native")]) == 2
    assert f"{name} is {scale} at [0, 1]" in capsys.readouterr().err
    assert not (tmp_path / "native").exists()


def test_a_scale_of_zero_is_named_unless_its_weights_are_zeros(tmp_path, capsys):
    published, _ = float8_weights(random_weights(WIDE))
    names = [f"model.layers.1.self_attn.{part}_proj.weight" for part in ("q_b", "kv_b")]
    for name in names:
        published[name + "_scale_inv"][-1, 0] = 0
    published[names[1]][128 * (len(published[names[1] + "_scale_inv"]) - 1) :] = 0
    source = write_published(tmp_path / "source", WIDE, published)
    assert main(["from-hf", str(source), str(tmp_path / "native")]) == 2
    error = capsys.readouterr().err
    assert f"{names[0]}_scale_inv is 0.0 at" in error and names[1] not in error
    published[names[0] + "_scale_inv"][-1, 0] = 1
    source = write_published(tmp_path / "source", WIDE, published)
    assert main(["from-hf", str(source), str(tmp_path / "native")]) == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16, jnp.float8_e4m3fn])
def test_weights_that_are_not_finite_are_counted(dtype):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 700_000)).astype(dtype)
    assert num_not_finite(values) == 0
    values[1, ::1000] = np.nan
    values[2, :7] = -np.inf  # of which float8 has none
    assert num_not_finite(values) == np.count_nonzero(~np.isfinite(values.astype(np.float32)))
    assert num_not_finite(values[:0]) == 0


def test_weights_that_are_not_finite_are_named_and_refused_if_asked(tmp_path, capsys):
    weights = random_weights(TINY)
    expert = "model.layers.4.mlp.experts.{}.up_proj.weight"
    for number in range(8):
        weights[expert.format(number)][3, :number] = np.nan
    weights["model.norm.weight"][0] = np.inf
    source = write_published(tmp_path / "source", TINY, weights, num_shards=3)
    assert main(["from-hf", str(source), str(tmp_path / "x"), "--strict"]) == 2
    error = capsys.readouterr().err
    assert "model.layers.*.mlp.experts.*.up_proj.weight (7 tensors, such as " in error
    assert "has weights that are NaN or infinite (28)" in error
    assert "model.norm.weight has weights that are NaN or infinite (1)" in error
    assert not (tmp_path / "x").exists()
    assert main(["from-hf", str(source), str(tmp_path / "x")]) == 0  # what was done is not lost
    assert "3 of 3 shards are done already" in (error := capsys.readouterr().err)
    assert "NaN or infinite (28)" in error


def test_float8_that_overflows_is_named(tmp_path, capsys):
    published, _ = float8_weights(random_weights(WIDE))
    name = "model.layers.1.self_attn.q_b_proj.weight"
    published[name + "_scale_inv"][0, 0] = 3e38
    source = write_published(tmp_path / "source", WIDE, published)
    assert main(["from-hf", str(source), str(tmp_path / "x"), "--strict"]) == 2
    error = capsys.readouterr().err
    assert f"{name} has weights that are NaN or infinite" in error and error.count("\n") == 1
