"""The model FLOPs of a training step, and the share of a machine's that they are (MFU).

By the usual convention (PaLM, arXiv:2204.02311, appendix B) these are the products that the model
asks for, however it is computed: two for each multiply and add, the gradient twice as many as the
pass forward, nothing computed again. Norms, softmax, routing and the optimizer count for nothing.

A pass forward over a row of T tokens, of which the query at t sees t and attends to `min(topk, t)`
in the stage sparse, to all of them in the others:

    attention     2 T (every projection's size) + 2 N (H + R + V) (tokens attended to)
    dense layer   2 T 3 D F
    MoE layer     2 T (D E + (K + shared experts) 3 D F)
    indexer       2 T (its projections' size) + 2 I (J + 1) (tokens seen)
    MTP layer     a MoE layer, its indexer, and 2 T 2 D D; T - d tokens at depth d
    head          2 D Z of every token that is predicted, T - 1 - d at depth d

Where documents are packed a token sees only its own, so that attention and indexer do less.
"""

import jax

from glm5_jax.config import Config
from glm5_jax.layers import LayerKind
from glm5_jax.plan.chips import CHIPS
from train.loss import Objective

# By the name that JAX has for a device: its chip, and how many such devices one chip is. A chip of
# v4 is one, its two cores together; one of v7 is two.
_DEVICES = {
    "TPU v4": ("v4", 1),
    "TPU v5 lite": ("v5e", 1),
    "TPU v5e": ("v5e", 1),
    "TPU v5": ("v5p", 1),
    "TPU v5p": ("v5p", 1),
    "TPU v6 lite": ("v6e", 1),
    "TPU v6e": ("v6e", 1),
    "TPU7x": ("v7", 2),
    "NVIDIA H100 80GB HBM3": ("h100", 1),
    "NVIDIA H200": ("h200", 1),
    "NVIDIA B200": ("b200", 1),
}


def peak_flops(device: jax.Device, dtype: str) -> float | None:
    """What a device is published to do in a second with products of a dtype; None if unknown.

    Other chips of the same family, and parts of one, have other names and are unknown.
    """
    if device.device_kind not in _DEVICES:
        return None
    chip, devices = _DEVICES[device.device_kind]
    return CHIPS[chip].rate(dtype) / devices


def step_flops(config: Config, objective: Objective, batch: int, length: int) -> float:
    """The model FLOPs of a training step on `batch` rows of `length` tokens, on all devices.

    Weights that do not learn have no gradient to compute. Indexers learn from the tokens that are
    attended to, though they score all that are seen.
    """
    passes = 1 if objective.stage == "warmup" else 3
    passes_ahead = passes if objective.mtp_weight else 1
    total = 0.0
    for kind in config.layers:
        total += passes * _layer(config, objective, kind, length)
        if kind.indexer == "full":
            total += _indexer(config, objective, length)
    total += passes * _head(config, length - 1)
    for depth in range(1, objective.mtp_depth + 1):
        seen = length - depth
        join = 2.0 * seen * 2 * config.dim**2
        layer = join + _layer(config, objective, config.mtp_kind, seen) + _head(config, seen - 1)
        total += passes_ahead * layer + _indexer(config, objective, seen)
    return batch * total


def _layer(config: Config, objective: Objective, kind: LayerKind, length: int) -> float:
    """A layer without its indexer, forward."""
    mla, moe, dim = config.mla, config.moe, config.dim
    per_head = mla.nope_dim + mla.rope_dim + mla.value_dim
    weights = dim * (mla.q_rank + mla.row_dim)
    weights += mla.num_heads * mla.q_rank * (mla.nope_dim + mla.rope_dim)
    weights += mla.num_heads * mla.kv_rank * (mla.nope_dim + mla.value_dim)
    weights += mla.num_heads * mla.value_dim * dim
    if kind.mlp == "dense":
        weights += 3 * dim * config.dense_ffn
    else:
        weights += dim * moe.num_experts
        weights += (moe.experts_per_token + moe.num_shared_experts) * 3 * dim * moe.ffn
    attended = _seen(length, _topk(config, objective))
    return 2.0 * length * weights + 2.0 * mla.num_heads * per_head * attended


def _indexer(config: Config, objective: Objective, length: int) -> float:
    """An indexer, forward and, where it learns, back; none where nothing asks for its scores."""
    indexer, topk = config.indexer, _topk(config, objective)
    selects = topk is not None and topk < length
    if not selects and not objective.teaches_indexers:
        return 0.0
    weights = indexer.num_heads * indexer.head_dim * config.mla.q_rank
    weights += (indexer.head_dim + indexer.num_heads) * config.dim
    projections = 2.0 * length * weights
    per_token = 2.0 * indexer.num_heads * (indexer.head_dim + 1)
    forward = projections + per_token * _seen(length)
    if not objective.teaches_indexers:
        return forward
    return forward + 2 * (projections + per_token * _seen(length, topk))


def _head(config: Config, num_tokens: int) -> float:
    return 2.0 * num_tokens * config.dim * config.vocab_size


def _topk(config: Config, objective: Objective) -> int | None:
    """How many tokens are attended to at most; None for all."""
    return config.indexer.topk if objective.stage == "sparse" else None


def _seen(length: int, topk: int | None = None) -> int:
    """How many tokens all queries of a row see together, or the first `topk` that each does."""
    most = length if topk is None else min(topk, length)
    return most * (most + 1) // 2 + (length - most) * most
