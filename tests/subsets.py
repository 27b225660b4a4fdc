"""Parts of a checkpoint, put together by hand."""

DENSE, SPARSE, FULL, SAME = "dense", "sparse", "full", "shared"


def small(raw, mlp, indexer, **changes):
    """The config of a subset, written down by hand."""
    kinds = {"mlp_layer_types": mlp, "indexer_types": indexer, "num_hidden_layers": len(mlp)}
    return raw | kinds | {"first_k_dense_replace": (mlp + [SPARSE]).index(SPARSE)} | changes


def by_hand(weights, kept, raw):
    """The weights of a subset."""
    count = raw["n_routed_experts"]
    found = {name: w for name, w in weights.items() if ".layers." not in name}
    for new, old in enumerate(kept):
        for name, w in weights.items():
            if not name.startswith(f"model.layers.{old}."):
                continue
            rest = name.split(".", 3)[3]
            if rest.startswith("mlp.experts.") and int(rest.split(".")[2]) >= count:
                continue
            if rest.startswith("mlp.gate."):
                w = w[:count].copy()
            found[f"model.layers.{new}.{rest}"] = w
    return found
