"""Weights kept in few bits: the model computes what it would with the weights multiplied out."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import quantize
from convert.__main__ import main
from glm5_jax.__main__ import main as glm5
from glm5_jax.checkpoint import restore_checkpoint, save_checkpoint
from glm5_jax.collectives import MESH_AXES
from glm5_jax.errors import InputError
from glm5_jax.inference.generate import Generator
from glm5_jax.inference.request import Sampling
from glm5_jax.inference.score import score
from glm5_jax.load import load_model
from glm5_jax.mesh import make_mesh
from glm5_jax.model import Glm5
from glm5_jax.published.native import NativeSource
from glm5_jax.published.safetensors import SafetensorsFile
from glm5_jax.published.source import PublishedSource
from glm5_jax.quantization import SCHEMES, abstract
from glm5_jax.quantized import is_quantized, packed, unpacked
from glm5_jax.sharding import DECODE, Partition
from tests.tiny import (
    SHARED,
    TOKENS,
    WIDE,
    build_model,
    float8_weights,
    random_weights,
    tiny_config,
    write_published,
)

# Blocks of 128 with parts of blocks along every kind of axis, heads that blocks straddle, and few
# enough tokens selected that a fault of the indexer shows; eight devices divide every axis.
RAW = SHARED | {key: WIDE[key] for key in ("hidden_size", "q_lora_rank", "intermediate_size")}
RAW |= {"vocab_size": 104, "num_attention_heads": 8, "num_key_value_heads": 8}
BATCH = np.array([TOKENS, TOKENS[::-1]])


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    tensors, _ = float8_weights(random_weights(RAW, seed=3))
    return write_published(tmp_path_factory.mktemp("float8") / "published", RAW, tensors, 3)


@pytest.fixture(scope="module")
def kept(published):
    made = published.parent / "kept"
    assert main(["from-hf", str(published), str(made), "--float8-as", "float8"]) == 0
    return made


def quantized_leaves(model):
    leaves = jax.tree.leaves(model, is_leaf=is_quantized)
    return [leaf for leaf in leaves if is_quantized(leaf)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_those_of_the_weights_multiplied_out(published, kept, dtype):
    model = restore_checkpoint(kept, dtype)
    assert len(quantized_leaves(model)) > 20
    expected = list(score(load_model(published, dtype), BATCH, depth=2))
    for actual, wanted in zip(score(model, BATCH, depth=2), expected, strict=True):
        for name, values in wanted.items():
            np.testing.assert_array_equal(actual[name], values, err_msg=name)


def test_text_is_that_of_the_weights_multiplied_out(published, kept):
    """Through the cache, and with drafts."""
    prompts, sampling = [TOKENS[:15], TOKENS[3:9]], Sampling(temperature=1.0, seed=3)
    texts = [
        Generator(load_model(directory), draft_tokens=2).complete(prompts, 20, sampling)
        for directory in (published, kept)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 1, 8), (2, 2, 2), (1, 2, 4)])
def test_a_mesh_divides_values_and_scales(kept, shape):
    partition = Partition(make_mesh(dict(zip(MESH_AXES, shape, strict=True))), DECODE)
    expected = list(score(load_model(kept), BATCH, depth=1))
    restored = load_model(kept, partition=partition)
    placed = partition.place(load_model(kept), Glm5(restored.config))
    for leaf, other in zip(jax.tree.leaves(restored), jax.tree.leaves(placed), strict=True):
        np.testing.assert_array_equal(leaf, other)
    for actual, wanted in zip(score(restored, BATCH, 1, partition), expected, strict=True):
        for name, values in wanted.items():
            np.testing.assert_allclose(actual[name], values, rtol=0, atol=1e-5 * abs(values).max())


def held(directory):
    """Dtype, shape and bytes of every tensor of a published directory, as its files have them."""
    tensors = {}
    for path in directory.glob("*.safetensors"):
        with SafetensorsFile(path) as file:
            for name, info in file.tensors.items():
                tensors[name] = info.dtype, info.shape, file.read(name, 0, info.shape[0]).tobytes()
    return tensors


def test_kept_float8_converts_back_to_the_same_bytes(published, kept, tmp_path, capsys):
    back = tmp_path / "back"
    assert main(["to-hf", str(kept), str(back), "--shard-size", "1MB"]) == 0
    assert held(back) == held(published)
    assert main(["diff", str(published), str(kept)]) == 0
    assert main(["verify", str(kept), "--against", str(published)]) == 0
    assert main(["verify", str(back), "--against", str(kept)]) == 0
    config = json.loads((back / "config.json").read_text())
    assert config == json.loads((published / "config.json").read_text())


def test_kept_float8_can_be_multiplied_out_later(published, kept, tmp_path):
    for directory, command in ((published, "from-hf"), (kept, "to-hf")):
        options = ["--float8-as", "float32"] if command == "from-hf" else ["--dtype", "float32"]
        assert main([command, str(directory), str(tmp_path / command), *options]) == 0
    assert main(["diff", str(tmp_path / "from-hf"), str(tmp_path / "to-hf")]) == 0


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    write_published(folder / "published", RAW, random_weights(RAW, seed=3))
    assert main(["from-hf", str(folder / "published"), str(folder / "native")]) == 0
    return folder / "native"


def rounded_in_blocks(weight, scheme):
    """A matrix rounded block by block, said as plainly as it can be."""
    rows, columns, largest = {
        "float8": (128, 128, 448),
        "int8": (1, weight.shape[1], 127),
        "int4": (1, 128, 7),
    }[scheme]
    result = np.empty_like(weight)
    for i in range(0, weight.shape[0], rows):
        for j in range(0, weight.shape[1], columns):
            block = np.s_[i : i + rows, j : j + columns]
            scale = np.float32(np.abs(weight[block]).max() / np.float32(largest))
            values = weight[block] / scale
            if scheme == "float8":
                values = values.astype(jnp.float8_e4m3fn).astype(np.float32)
            else:
                values = np.rint(values)
            result[block] = values * scale
    return result


def reference(scheme):
    """The weights that a scheme makes of the plain ones, and the relative error of each."""
    left_alone = ("embed_tokens", "lm_head", "mlp.gate.weight", "weights_proj", "eh_proj")
    weights, errors = random_weights(RAW, seed=3), {}
    for name, weight in weights.items():
        is_expert = ".mlp.experts." in name
        if weight.ndim < 2 or any(part in name for part in left_alone):
            continue
        if scheme != "int4" or is_expert:
            weights[name] = rounded_in_blocks(weight, scheme)
            difference = weight - weights[name]
            errors[name] = np.linalg.norm(difference) / np.linalg.norm(weight)
    return weights, errors


@pytest.mark.parametrize("scheme", ["float8", "int8", "int4"])
def test_quantizing_rounds_to_the_nearest_multiple_of_a_scale(plain, tmp_path, capsys, scheme):
    made = tmp_path / "made"
    assert main(["quantize", str(plain), str(made), "--to", scheme]) == 0
    weights, errors = reference(scheme)
    source = NativeSource(made)
    for name, weight in weights.items():
        np.testing.assert_allclose(source.read(name, 0, len(weight)), weight, rtol=1e-6, atol=1e-9)
        assert source.has_scales(name) == (name in errors)
    experts = [errors[name] for name in errors if name.endswith("experts.0.up_proj.weight")]
    assert 0.001 < max(experts) < 0.2
    lines = capsys.readouterr().out.splitlines()
    told = next(line for line in lines if "mlp.experts.*.up_proj" in line)
    ups = [error for name, error in errors.items() if ".experts." in name and "up_proj" in name]
    assert told.endswith(f": relative error {np.mean(ups):.3%}, at most {max(ups):.3%}")
    assert f"{len(weights)} tensors, {len(errors)} of them in {scheme}, " in lines[-1]
    assert main(["verify", str(made), "--against", str(plain)]) == 0
    model, tokens = restore_checkpoint(made), BATCH
    expected = list(score(build_model(RAW, weights), tokens, depth=1))
    for actual, wanted in zip(score(model, tokens, depth=1), expected, strict=True):
        for name, values in wanted.items():
            np.testing.assert_allclose(actual[name], values, rtol=0, atol=1e-5 * abs(values).max())
    prompts, sampling = [TOKENS[:15], TOKENS[3:9]], Sampling()
    texts = [
        Generator(each).complete(prompts, 12, sampling)
        for each in (model, build_model(RAW, weights))
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 2, 2)])
def test_a_mesh_divides_integers_too(plain, tmp_path, scheme, shape):
    made = tmp_path / "made"
    assert main(["quantize", str(plain), str(made), "--to", scheme]) == 0
    partition = Partition(make_mesh(dict(zip(MESH_AXES, shape, strict=True))), DECODE)
    expected = list(score(load_model(made), BATCH))
    model = load_model(made, partition=partition)
    for actual, wanted in zip(score(model, BATCH, partition=partition), expected, strict=True):
        logits = wanted["logits"]
        np.testing.assert_allclose(actual["logits"], logits, rtol=0, atol=1e-5 * abs(logits).max())


def test_pairs_of_four_bits_are_unpacked_as_they_were():
    values = np.random.default_rng(0).integers(-8, 8, (3, 6, 7)).astype(np.int8)
    pairs = packed(values)
    assert pairs.shape == (3, 3, 7) and pairs.dtype == np.uint8
    np.testing.assert_array_equal(unpacked(pairs), values)
    np.testing.assert_array_equal(jax.jit(unpacked)(pairs), values)


def test_rounding_what_is_rounded_is_refused(kept, tmp_path, capsys):
    assert main(["quantize", str(kept), str(tmp_path / "made"), "--to", "int8"]) == 2
    assert "has weights in few bits already" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_integers_are_not_published(plain, tmp_path, capsys):
    made = tmp_path / "made"
    assert main(["quantize", str(plain), str(made), "--to", "int4"]) == 0
    assert main(["to-hf", str(made), str(tmp_path / "back")]) == 2
    assert "expected --dtype bfloat16 or float32" in capsys.readouterr().err
    assert main(["to-hf", str(made), str(tmp_path / "back"), "--dtype", "float32"]) == 0
    weights, _ = reference("int4")
    source = PublishedSource(tmp_path / "back")
    for name, weight in weights.items():
        np.testing.assert_allclose(source.read(name, 0, len(weight)), weight, rtol=1e-6, atol=1e-9)


def test_weights_in_few_bits_are_not_saved_as_others_are(kept, tmp_path):
    with pytest.raises(ValueError, match="few bits"):
        save_checkpoint(tmp_path / "made", restore_checkpoint(kept))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damaged", ["values", "scales"])
def test_what_was_rounded_otherwise_is_named(plain, tmp_path, capsys, damaged):
    """The digests are right, and the values are not those that rounding gives."""
    made = tmp_path / "made"
    original = quantize._Quantization._put

    def put(self, leaf, position, chunk):
        if leaf == f"segments.0.layers.0.mlp.up.{damaged}" and position[0] == 1:
            chunk = chunk * 2 if damaged == "scales" else chunk ^ 1
        return original(self, leaf, position, chunk)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(quantize._Quantization, "_put", put)
        assert main(["quantize", str(plain), str(made), "--to", "int8"]) == 0
    assert main(["verify", str(made)]) == 0
    capsys.readouterr()
    assert main(["verify", str(made), "--against", str(plain)]) == 2
    error = capsys.readouterr().err
    assert (
        "model.layers.1.mlp.up_proj.weight: has other values" in error and "layers.0" not in error
    )


@pytest.mark.parametrize("scheme", ["float8", "int4"])
def test_weights_that_are_not_finite_are_not_rounded(tmp_path, capsys, scheme):
    weights = random_weights(RAW, seed=3)
    name = "model.layers.4.mlp.experts.3.up_proj.weight"
    weights[name][5, 7] = np.nan
    write_published(tmp_path / "published", RAW, weights)
    assert main(["from-hf", str(tmp_path / "published"), str(tmp_path / "native")]) == 0
    capsys.readouterr()
    made = tmp_path / "made"
    assert main(["quantize", str(tmp_path / "native"), str(made), "--to", scheme]) == 2
    assert f"{name} has weights that are NaN or infinite" in capsys.readouterr().err
    assert not made.exists()


def test_devices_that_would_cut_pairs_of_rows_apart_are_refused():
    odd = dataclasses.replace(tiny_config(RAW).moe, ffn=24)
    blueprint = Glm5(dataclasses.replace(tiny_config(RAW), moe=odd))
    partition = Partition(make_mesh({"data": 1, "expert": 1, "model": 8}), DECODE)
    with pytest.raises(InputError, match="has 12 pairs of rows of int4, which 8 devices"):
        abstract(blueprint, SCHEMES["int4"], "float32", partition)


def test_a_plan_of_a_checkpoint_knows_how_its_weights_are_kept(kept, capsys):
    work = ["--topology", "h100:1", "--batch", "1", "--context", "64", "--json"]
    assert glm5(["plan", str(kept), *work]) == 0
    found = json.loads(capsys.readouterr().out)
    leaves = jax.tree.leaves(load_model(kept))
    assert found["scheme"] == "float8"
    assert found["memory"]["weights"] == sum(leaf.nbytes for leaf in leaves)
    assert glm5(["plan", str(kept), *work, "--weights", "plain"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"]["weights"] > found["memory"]["weights"]
    assert glm5(["plan", "demo", *work, "--job", "train", "--weights", "int8"]) == 2
    assert "--weights is int8, in which train cannot keep them" in capsys.readouterr().err


def test_what_is_checked_is_told_by_its_dtypes(published, kept, capsys):
    for directory in (published, kept):
        assert main(["check", str(directory)]) == 0
        assert "of float32, float8_e4m3fn;" in capsys.readouterr().out
