import math

import pytest

from glm5_jax.model import Glm5
from glm5_jax.params import leaves_by_path
from glm5_jax.presets import PRESETS, load_preset
from glm5_jax.published.names import num_stacked_axes, published_tensors
from tests.tiny import GROUPED, SHARED, TINY, tiny_config

CONFIGS = {name: load_preset(name).config for name in PRESETS} | {
    "tiny": tiny_config(TINY),
    "shared": tiny_config(SHARED),
    "grouped": tiny_config(GROUPED),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_element_of_every_leaf_is_in_one_published_tensor(config):
    tensors = list(published_tensors(config))
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    specs = leaves_by_path(Glm5(config))
    covered = {leaf: set() for leaf in specs}
    for _, shape, leaf, at in tensors:
        assert at not in covered[leaf] and len(at) == num_stacked_axes(specs[leaf])
        assert math.prod(shape) == math.prod(specs[leaf].shape[len(at) :])
        covered[leaf].add(at)
    for leaf, spec in specs.items():
        assert len(covered[leaf]) == math.prod(spec.shape[: num_stacked_axes(spec)])


@pytest.mark.parametrize(
    ("name", "count", "bf16_bytes"),
    [("glm-5", 59_870, 1_507_728_316_928), ("glm-5.2", 59_585, 1_506_659_919_872)],
)
def test_counts_and_bytes_are_those_of_the_published_files(name, count, bf16_bytes):
    tensors = list(published_tensors(CONFIGS[name]))
    assert len(tensors) == count
    sizes = {t.name: math.prod(t.shape) for t in tensors}
    wide = sum(size for n, size in sizes.items() if n.endswith("e_score_correction_bias"))
    assert 2 * (sum(sizes.values()) - wide) + 4 * wide == bf16_bytes


def test_shapes_are_those_of_the_published_files():
    shapes = {t.name: t.shape for t in published_tensors(CONFIGS["glm-5.2"])}
    layer = "model.layers.6."
    assert shapes[layer + "self_attn.q_a_proj.weight"] == (2048, 6144)
    assert shapes[layer + "self_attn.q_b_proj.weight"] == (16384, 2048)
    assert shapes[layer + "self_attn.kv_a_proj_with_mqa.weight"] == (576, 6144)
    assert shapes[layer + "self_attn.kv_b_proj.weight"] == (28672, 512)
    assert shapes[layer + "self_attn.o_proj.weight"] == (6144, 16384)
    assert shapes[layer + "self_attn.indexer.wq_b.weight"] == (4096, 2048)
    assert shapes[layer + "self_attn.indexer.wk.weight"] == (128, 6144)
    assert shapes[layer + "self_attn.indexer.weights_proj.weight"] == (32, 6144)
    assert shapes[layer + "mlp.gate.weight"] == (256, 6144)
    assert shapes[layer + "mlp.experts.255.down_proj.weight"] == (6144, 2048)
    assert shapes["model.layers.78.eh_proj.weight"] == (6144, 12288)
    assert "model.layers.7.self_attn.indexer.wk.weight" not in shapes
    assert "model.layers.78.self_attn.indexer.wk.weight" in shapes
