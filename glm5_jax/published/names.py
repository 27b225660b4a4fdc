"""The table of published tensor names.

Weights are kept in the published order of axes, so a published tensor is one slice of one leaf,
reshaped at most: the same bytes in the same order.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from glm5_jax.config import Config
from glm5_jax.model import Glm5
from glm5_jax.params import ParamSpec, leaves_by_path

# Leaf of a block -> published name after `model.layers.N.`
BLOCK_NAMES = {
    "attention_norm": "input_layernorm.weight",
    "attention.q_down": "self_attn.q_a_proj.weight",
    "attention.q_norm": "self_attn.q_a_layernorm.weight",
    "attention.q_up": "self_attn.q_b_proj.weight",
    "attention.kv_down": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_norm": "self_attn.kv_a_layernorm.weight",
    "attention.kv_up": "self_attn.kv_b_proj.weight",
    "attention.out": "self_attn.o_proj.weight",
    "indexer.query": "self_attn.indexer.wq_b.weight",
    "indexer.key": "self_attn.indexer.wk.weight",
    "indexer.key_scale": "self_attn.indexer.k_norm.weight",
    "indexer.key_bias": "self_attn.indexer.k_norm.bias",
    "indexer.head_gate": "self_attn.indexer.weights_proj.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "mlp.gate": "mlp.gate_proj.weight",
    "mlp.up": "mlp.up_proj.weight",
    "mlp.down": "mlp.down_proj.weight",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.bias": "mlp.gate.e_score_correction_bias",
    "mlp.shared.gate": "mlp.shared_experts.gate_proj.weight",
    "mlp.shared.up": "mlp.shared_experts.up_proj.weight",
    "mlp.shared.down": "mlp.shared_experts.down_proj.weight",
}
EXPERT_NAMES = {
    "gate": "mlp.experts.{expert}.gate_proj.weight",
    "up": "mlp.experts.{expert}.up_proj.weight",
    "down": "mlp.experts.{expert}.down_proj.weight",
}
# The MTP layer stands after the last layer, under the next number.
MTP_NAMES = {
    "embedding_norm": "enorm.weight",
    "hidden_norm": "hnorm.weight",
    "join": "eh_proj.weight",
    "norm": "shared_head.norm.weight",
}
MODEL_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
}
# Copies of the main model's tensors that some files carry in the MTP layer.
MTP_COPIES = {
    "embed_tokens.weight": MODEL_NAMES["embedding"],
    "shared_head.head.weight": MODEL_NAMES["head"],
}


_HEADS = ("heads", "index_heads")  # published in one axis with what is of each of them


class PublishedTensor(NamedTuple):
    """A published tensor and the slice of a leaf that holds it."""

    name: str
    shape: tuple[int, ...]
    leaf: str
    at: tuple[int, ...]  # index into the leaf's leading axes


def layer_prefix(layer: int) -> str:
    """What the names of a layer's tensors start with."""
    return f"model.layers.{layer}."


def published_shape(spec: ParamSpec) -> tuple[int, ...]:
    """The shape of one published tensor of a leaf: unstacked, heads merged with their dims."""
    return tuple(
        math.prod(spec.shape[axis] for axis in merged) for merged in axes_of_published(spec)
    )


def axes_of_published(spec: ParamSpec) -> tuple[tuple[int, ...], ...]:
    """The axes of a leaf that make up each axis of a published tensor."""
    stacked = num_stacked_axes(spec)
    single: list[tuple[int, ...]] = [(axis,) for axis in range(stacked, len(spec.shape))]
    heads = [axis for axis in range(stacked, len(spec.shape)) if spec.axes[axis] in _HEADS]
    if len(single) == 3 and heads:
        at = heads[0] - stacked
        single[at : at + 2] = [(heads[0], heads[0] + 1)]
    return tuple(single)


def num_stacked_axes(spec: ParamSpec) -> int:
    """How many leading axes of a leaf count tensors and are not part of any."""
    return sum(axis in ("layers", "experts") for axis in spec.axes)


def published_tensors(config: Config) -> Iterator[PublishedTensor]:
    """Every tensor of a published checkpoint of this config, in the order of the layers."""
    model = Glm5(config)
    yield from _tensors(leaves_by_path(model), MODEL_NAMES, "", "", ())
    for layer, place in enumerate(config.places):
        segment = model.segments[place.segment]
        prefix = layer_prefix(layer)
        leaf_prefix = f"segments.{place.segment}."
        block, experts = segment.layers[place.slot], segment.experts[place.slot]
        block_prefix = f"{leaf_prefix}layers.{place.slot}."
        yield from _tensors(
            leaves_by_path(block), BLOCK_NAMES, prefix, block_prefix, (place.group,)
        )
        if experts is not None:
            experts_prefix = f"{leaf_prefix}experts.{place.slot}."
            yield from _expert_tensors(experts, prefix, experts_prefix, (place.group,))
    if model.mtp is not None:
        prefix = layer_prefix(config.num_layers)
        yield from _tensors(leaves_by_path(model.mtp), MTP_NAMES, prefix, "mtp.", ())
        block_leaves = leaves_by_path(model.mtp.block)
        yield from _tensors(block_leaves, BLOCK_NAMES, prefix, "mtp.block.", ())
        yield from _expert_tensors(model.mtp.experts, prefix, "mtp.experts.", ())


def _tensors(
    leaves: dict[str, ParamSpec],
    names: dict[str, str],
    prefix: str,
    leaf_prefix: str,
    at: tuple[int, ...],
) -> Iterator[PublishedTensor]:
    for leaf, name in names.items():
        if leaf in leaves:
            shape = published_shape(leaves[leaf])
            yield PublishedTensor(prefix + name, shape, leaf_prefix + leaf, at)


def _expert_tensors(
    experts: Any, prefix: str, leaf_prefix: str, at: tuple[int, ...]
) -> Iterator[PublishedTensor]:
    leaves = leaves_by_path(experts)
    for expert in range(experts.gate.shape[-3]):
        names = {leaf: name.format(expert=expert) for leaf, name in EXPERT_NAMES.items()}
        yield from _tensors(leaves, names, prefix, leaf_prefix, (*at, expert))
