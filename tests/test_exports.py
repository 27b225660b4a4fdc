"""What PyTorch programs name or stack in other ways converts as what was published."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from convert.__main__ import main
from glm5_jax.errors import InputError
from glm5_jax.load import load_model
from glm5_jax.params import leaves_by_path
from glm5_jax.published.source import PublishedSource
from tests.tiny import GROUPED, TINY, WIDE, float8_weights, random_weights, write_published

BLOCKS = WIDE | {"moe_intermediate_size": 128}  # whole blocks of scales in gate and in up


def fused(weights, suffix=""):
    """Experts as transformers' modules hold them."""
    found = {name: w for name, w in weights.items() if ".experts." not in name}
    groups = {}
    for name in weights.keys() - found.keys():
        prefix, _, rest = name.partition("experts.")
        expert, part, kind = rest.split(".")
        fused_name = "down_proj" if part == "down_proj" else "gate_up_proj"
        group = groups.setdefault(
            prefix + "experts." + fused_name + kind.replace("weight", suffix), {}
        )
        group[int(expert), part] = weights[name]
    for name, group in groups.items():
        experts = range(max(expert for expert, _ in group) + 1)
        parts = sorted({part for _, part in group})  # gate before up
        found[name] = np.stack(
            [np.concatenate([group[e, part] for part in parts]) for e in experts]
        )
    return found


def assert_equal_models(first, second):
    expected = leaves_by_path(load_model(second))
    for leaf, array in leaves_by_path(load_model(first)).items():
        np.testing.assert_array_equal(array, expected[leaf])


@pytest.mark.parametrize("raw", [TINY, GROUPED], ids=["full", "grouped"])
@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_fused_experts_are_those_that_were_published(tmp_path, capsys, raw, suffix):
    weights = random_weights(raw)
    plain = write_published(tmp_path / "plain", raw, weights, num_shards=2)
    source = write_published(tmp_path / "source", raw, fused(weights, suffix), num_shards=3)
    assert len(fused(weights)) < len(weights) - 60
    assert main(["check", str(source)]) == 0
    assert main(["diff", str(source), str(plain)]) == 0
    assert "0 differences" in capsys.readouterr().out
    native = tmp_path / "native"
    assert main(["from-hf", str(source), str(native)]) == 0
    assert main(["verify", str(native), "--against", str(plain)]) == 0
    assert main(["verify", str(native), "--against", str(source)]) == 0
    assert_equal_models(source, plain)


def test_fused_float8_is_multiplied_by_its_own_scales(tmp_path):
    weights, values = float8_weights(random_weights(BLOCKS))
    source = write_published(tmp_path / "source", BLOCKS, fused(weights))
    assert_equal_models(source, write_published(tmp_path / "plain", BLOCKS, values))
    assert main(["from-hf", str(source), str(tmp_path / "native")]) == 0
    assert main(["verify", str(tmp_path / "native"), "--against", str(tmp_path / "plain")]) == 0


def test_scales_that_may_span_gate_and_up_are_refused(tmp_path):
    weights, _ = float8_weights(random_weights(WIDE))
    write_published(tmp_path, WIDE, fused(weights))
    with pytest.raises(
        InputError, match="scale gate and up together: 128 does not divide their 32"
    ):
        PublishedSource(tmp_path)


def test_every_fused_tensor_of_another_shape_is_named(tmp_path):
    weights = fused(random_weights(WIDE))
    for part in ("gate_up", "down"):
        name = f"model.layers.3.mlp.experts.{part}_proj"
        weights[name] = weights[name].transpose(0, 2, 1).copy()
    write_published(tmp_path, WIDE, weights)
    with pytest.raises(InputError) as caught:
        PublishedSource(tmp_path)
    assert "gate_up_proj has shape [8, 192, 64], expected [8, 64, 192]" in str(caught.value)
    assert "down_proj has shape [8, 32, 192], expected [8, 192, 32]" in str(caught.value)


def test_an_expert_that_stands_alone_and_fused_is_refused(tmp_path):
    name = "model.layers.4.mlp.experts.2.up_proj.weight"
    weights = random_weights(TINY)
    write_published(tmp_path, TINY, fused(weights) | {name: weights[name]}, num_shards=2)
    with pytest.raises(InputError, match=f"{name} stands both alone and fused"):
        PublishedSource(tmp_path)


PREFIXES = {  # what `model.` becomes, and what stands before the head
    "base_model.model.model.": "base_model.model.",
    "model.language_model.": "",
    "module.model.": "module.",
    "": "",
    "thinker.model.": "thinker.",
}


@pytest.mark.parametrize("inner", PREFIXES)
def test_one_common_prefix_is_passed_over_and_told_of(tmp_path, capsys, inner):
    weights = random_weights(TINY)
    renamed = {
        inner + name.removeprefix("model.")
        if name.startswith("model.")
        else PREFIXES[inner] + name: w
        for name, w in fused(weights).items()
    }
    source = write_published(tmp_path / "source", TINY, renamed, num_shards=2)
    assert main(["from-hf", str(source), str(tmp_path / "native")]) == 0
    assert capsys.readouterr().err.count(f"tensors named {inner!r} are read as 'model.'") == 1
    plain = write_published(tmp_path / "plain", TINY, weights)
    assert main(["verify", str(tmp_path / "native"), "--against", str(plain)]) == 0
    assert_equal_models(source, plain)


def test_published_names_are_not_remarked_on(tmp_path, capsys):
    assert main(["check", str(write_published(tmp_path, TINY, random_weights(TINY)))]) == 0
    assert capsys.readouterr().err == ""


def test_several_prefixes_are_all_named(tmp_path):
    weights = random_weights(TINY)
    renamed = {
        name.replace("model.layers.5", "other.layers.5"): w for name, w in weights.items()
    } | {f"vision.{i}.norm.weight": np.zeros(3, np.float32) for i in range(9)}
    write_published(tmp_path, TINY, renamed)
    with pytest.raises(InputError) as caught:
        PublishedSource(tmp_path)
    said = str(caught.value)
    assert "with model. and with other. and with vision.*." in said and "(9 " in said


def test_a_head_beside_the_prefix_of_the_layers_is_refused(tmp_path):
    weights = random_weights(TINY)
    weights["tower.lm_head.weight"] = weights.pop("lm_head.weight")
    write_published(tmp_path, TINY, weights)
    with pytest.raises(InputError, match=r"'model\.' and the head 'tower\.'"):
        PublishedSource(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_transformers_saves_is_read_whichever_format_it_takes(tmp_path, dtype):
    torch = pytest.importorskip("torch", reason="PyTorch, the reference, is not installed")
    hf = pytest.importorskip("tests.reference.hf", reason="transformers is not installed")
    model = hf.hf_model(TINY, random_weights(TINY)).to(getattr(torch, dtype))
    for original in (True, False):
        model.save_pretrained(
            tmp_path / f"{original}", save_original_format=original, max_shard_size="200KB"
        )
    names = json.loads((tmp_path / "False" / "model.safetensors.index.json").read_text())
    assert "model.layers.3.mlp.experts.gate_up_proj" in names["weight_map"]
    assert main(["diff", str(tmp_path / "True"), str(tmp_path / "False")]) == 0
    kept = {n: w for n, w in random_weights(TINY).items() if ".layers.7." not in n}
    rounded = {n: w.astype(jnp.dtype(dtype)) for n, w in kept.items()}
    plain = write_published(tmp_path / "plain", TINY, rounded)
    assert_equal_models(tmp_path / "False", plain)
