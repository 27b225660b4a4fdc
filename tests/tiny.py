"""Small models for tests: configs, weights under published names, and published directories."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from glm5_jax.config import Config
from glm5_jax.config_json import parse_config
from glm5_jax.model import Glm5
from glm5_jax.params import ParamSpec, leaf_dtype, map_specs
from glm5_jax.published.fp8 import BLOCK, SCALE_SUFFIX, scale_shape
from glm5_jax.published.names import published_tensors

# Sizes are unequal wherever the model allows, so that no mix-up of axes goes unseen. Selection
# takes 8 of up to 24 tokens and sums 8 heads, or faults of the indexer would not show.
TINY: dict[str, Any] = {
    "model_type": "glm_moe_dsa",
    "architectures": ["GlmMoeDsaForCausalLM"],
    "dtype": "float32",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 20,
    "v_head_dim": 16,
    "index_n_heads": 8,
    "index_head_dim": 16,
    "index_topk": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 4,
    "indexer_types": ["full"] * 7,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    "num_nextn_predict_layers": 1,
    "pad_token_id": 0,
    "eos_token_id": [1],
}

# Index sharing as in GLM-5.2: a shared run, then a group of one full and three shared layers.
SHARED = TINY | {
    "indexer_types": ["full", "full", "full", "shared", "shared", "shared", "full"],
}

# Everything else that a config can change, and layers in no particular order.
GROUPED = TINY | {
    "indexer_types": ["full", "shared", "full", "full", "shared", "full", "shared"],
    "mlp_layer_types": ["dense", "sparse", "sparse", "dense", "sparse", "sparse", "sparse"],
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.5,
}

# Wider than one block of float8 scales, by a part of a block.
WIDE = TINY | {"hidden_size": 192, "q_lora_rank": 160, "intermediate_size": 144}

TOKENS = [(7 * i * i + 3 * i + 5) % 95 + 2 for i in range(24)]


def tiny_config(raw: Mapping[str, Any] = TINY) -> Config:
    return parse_config(dict(raw)).config


def random_weights(raw: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Weights under published names, large enough that every part shows in the logits."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape, _, _ in published_tensors(tiny_config(raw)):
        values = rng.standard_normal(shape)
        if name.endswith("norm.weight"):
            values = 1 + 0.1 * values
        elif len(shape) == 1:
            values = 0.1 * values
        elif "embed_tokens" not in name:
            values = 1.2 * values / np.sqrt(shape[-1])
        weights[name] = values.astype(np.float32)
    return weights


def build_model(
    raw: Mapping[str, Any], weights: Mapping[str, np.ndarray], dtype: Any = jnp.float32
) -> Glm5:
    """The model with the given weights."""
    config = tiny_config(raw)
    tensors = list(published_tensors(config))

    def fill(leaf: str, spec: ParamSpec) -> jax.Array:
        array = np.empty(spec.shape, np.float32)
        for name, _, owner, index in tensors:
            if owner == leaf:
                array[index] = weights[name].reshape(array[index].shape)
        return jnp.asarray(array, leaf_dtype(spec, dtype))

    return map_specs(fill, Glm5(config))


def random_model(raw: Mapping[str, Any] = TINY, seed: int = 0) -> Glm5:
    return build_model(raw, random_weights(raw, seed))


def float8_weights(
    weights: Mapping[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Quantizes what the published float8 checkpoints do.

    Returns:
      The tensors of a checkpoint, scales included, and the values that they stand for.
    """
    kept_parts = ("embed", "lm_head", "mlp.gate.", "weights_proj", "eh_proj")
    published, values = {}, {}
    for name, weight in weights.items():
        if weight.ndim < 2 or any(part in name for part in kept_parts):
            published[name] = values[name] = weight
            continue
        scales = np.zeros(scale_shape(weight.shape), np.float32)
        quantized = np.zeros(weight.shape, jnp.float8_e4m3fn)
        values[name] = np.zeros_like(weight)
        for i, j in np.ndindex(*scales.shape):
            block = np.s_[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
            scales[i, j] = np.abs(weight[block]).max() / 448
            quantized[block] = (weight[block] / scales[i, j]).astype(jnp.float8_e4m3fn)
            values[name][block] = quantized[block].astype(np.float32) * scales[i, j]
        published |= {name: quantized, name + SCALE_SUFFIX: scales}
    return published, values


def write_published(
    directory: Path,
    raw: Mapping[str, Any],
    weights: Mapping[str, np.ndarray],
    num_shards: int = 1,
) -> Path:
    """A published directory, in one file or in several with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw))
    names = list(weights)
    if num_shards == 1:
        save_file(dict(weights), directory / "model.safetensors", {"format": "pt"})
        return directory
    weight_map = {}
    for number in range(num_shards):
        shard = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        held = {name: weights[name] for name in names[number::num_shards]}
        save_file(held, directory / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(held, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory
