"""A model whose weights are a formula, and the logits that others computed for it.

The logits are from a float64 implementation that agreed with transformers 5.23 (float32, eager)
within 4.2e-6; transformers takes 1e-6 for the epsilon of the latent norms.
"""

from pathlib import Path
from typing import Any

import numpy as np

from glm5_jax.published.names import published_tensors
from tests.tiny import SHARED, TINY, tiny_config

_COMMON = {"mla_norm_eps": 1e-6, "num_nextn_predict_layers": 0}
CASES: dict[str, dict[str, Any]] = {
    "full": TINY | _COMMON,
    "indexshare": SHARED | _COMMON,
    "dense_equiv": TINY | _COMMON | {"index_topk": 64},
}


def golden_logits(case: str) -> np.ndarray:
    """Float64 [24, 97], for `tiny.TOKENS`."""
    with np.load(Path(__file__).with_name("golden.npz")) as file:
        return file[case]


def golden_weights(raw: dict[str, Any]) -> dict[str, np.ndarray]:
    """Sine waves, a different one for each tensor by the rank of its name.

    The ranks are of transformers' own parameters, where the experts of a layer are fused: gate
    above up in `gate_up_proj`, and `down_proj`.
    """
    shapes = {tensor.name: tensor.shape for tensor in published_tensors(tiny_config(raw))}
    fused: dict[str, tuple[int, ...]] = {}
    experts, ffn, dim = raw["n_routed_experts"], raw["moe_intermediate_size"], raw["hidden_size"]
    for name, shape in shapes.items():
        prefix, is_expert, _ = name.partition("experts.0.")
        if ".experts." not in name:
            fused[name] = shape
        elif is_expert:
            fused[f"{prefix}experts.gate_up_proj"] = (experts, 2 * ffn, dim)
            fused[f"{prefix}experts.down_proj"] = (experts, dim, ffn)
    values = {
        name: _waves(name, shape, rank) for rank, (name, shape) in enumerate(sorted(fused.items()))
    }
    weights = {name: values[name] for name in shapes if name in values}
    for name in shapes.keys() - weights.keys():
        prefix, _, rest = name.partition("experts.")
        expert, part, _ = rest.split(".")[:3]
        gate_up = values[f"{prefix}experts.gate_up_proj"][int(expert)]
        weights[name] = {
            "gate_proj": gate_up[:ffn],
            "up_proj": gate_up[ffn:],
            "down_proj": values[f"{prefix}experts.down_proj"][int(expert)],
        }[part]
    return weights


def _waves(name: str, shape: tuple[int, ...], rank: int) -> np.ndarray:
    k = np.arange(np.prod(shape), dtype=np.float64)
    waves = np.sin(0.7 * k * (1 + 0.01 * rank) + (0.001 * k * k) % 6.283185 + 1.3 * rank + 0.25)
    waves = waves.reshape(shape)
    if name.endswith("norm.weight"):
        waves = 1 + 0.1 * waves
    elif name.endswith("e_score_correction_bias"):
        waves = 0.05 * waves
    elif name.endswith("bias"):
        waves = 0.1 * waves
    elif "embed_tokens" not in name:
        waves = waves * 1.5 / np.sqrt(shape[-1])
    return waves.astype(np.float32)
