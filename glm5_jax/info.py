"""What can be said of a model from its config alone."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp

from glm5_jax.cache import KVCache
from glm5_jax.config import Config
from glm5_jax.model import Glm5
from glm5_jax.params import count_params, leaf_dtype, leaves_by_path


def describe(config: Config) -> dict[str, Any]:
    """Sizes, layers, parameter counts and memory of a model."""
    model = Glm5(config)
    leaves = leaves_by_path(model)
    total = count_params(model)
    mtp = 0 if model.mtp is None else count_params(model.mtp)

    def count(*parts: str) -> int:
        return sum(
            spec.size
            for path, spec in leaves.items()
            if not path.startswith("mtp.") and any(part in f".{path}." for part in parts)
        )

    experts = count(".experts.")
    share = config.moe.experts_per_token / config.moe.num_experts
    parts = {
        "embedding": count(".embedding."),
        "head": count(".head."),
        "attention": count(".attention."),
        "indexers": count(".indexer."),
        "routed experts": experts,
        "shared experts": count(".shared."),
        "routers": count(".router."),
        "dense feed-forward": count(".mlp.gate.", ".mlp.up.", ".mlp.down."),
        "norms": count(".norm.", ".attention_norm.", ".mlp_norm."),
    }
    cache = jax.eval_shape(lambda: KVCache.create(config, 1, 1, jnp.bfloat16))
    return {
        "layers": [
            {
                "groups": segment.count,
                "layers": [
                    {"count": len(list(run)), "mlp": kind.mlp, "indexer": kind.indexer}
                    for kind, run in itertools.groupby(segment.unit)
                ],
            }
            for segment in config.segments
        ],
        "num_layers": config.num_layers,
        "num_mtp_layers": config.num_mtp_layers,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "attention_heads": config.mla.num_heads,
        "index_topk": config.indexer.topk,
        "experts": f"{config.moe.experts_per_token} of {config.moe.num_experts}",
        "context": config.max_positions,
        "dtype": config.dtype,
        "parameters": {"total": total, "without MTP layer": total - mtp, **parts},
        "active parameters": round(total - mtp - experts * (1 - share) - parts["embedding"]),
        "weight bytes": sum(
            spec.size * leaf_dtype(spec, config.dtype).itemsize for spec in leaves.values()
        ),
        "cache bytes per token": sum(
            leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.pools)
        ),
    }


def format_description(name: str, facts: dict[str, Any]) -> str:
    """The same as lines of text."""
    lines = [name]

    def add(label: str, value: str) -> None:
        lines.append(f"  {label:24}{value}")

    for number, segment in enumerate(facts["layers"]):
        unit = " + ".join(
            f"{run['count']} {run['mlp']} with {run['indexer']} indexer"
            for run in segment["layers"]
        )
        add("" if number else f"{facts['num_layers']} layers", f"{segment['groups']} x ({unit})")
    add("MTP layers", str(facts["num_mtp_layers"]))
    add("vocabulary", f"{facts['vocab_size']:,}")
    add("hidden size", f"{facts['hidden_size']:,}, {facts['attention_heads']} heads")
    add("selected tokens", f"{facts['index_topk']:,}")
    add("experts per token", facts["experts"])
    add("context", f"{facts['context']:,}")
    for label, count in facts["parameters"].items():
        add("parameters" if label == "total" else f"  {label}", f"{count:>18,}")
    add("active per token", f"{facts['active parameters']:>18,}  without the embedding")
    add(f"weights in {facts['dtype']}", f"{facts['weight bytes']:>18,} bytes")
    add("cache per token", f"{facts['cache bytes per token']:>18,} bytes in bfloat16")
    return "\n".join(lines)
