"""The published `config.json`: read into a `Config`, and written from one.

Every key that changes the model is either understood or an error that names it; keys that do not
change it are listed once for the reader.
"""

import operator
from typing import Any, Literal, NamedTuple

from glm5_jax.config import Config, IndexerConfig, MlaConfig, MoeConfig
from glm5_jax.config_keys import LARGEST_SIZE, REQUIRED, Keys
from glm5_jax.errors import InputError
from glm5_jax.layers import LayerKind
from glm5_jax.published.fp8 import BLOCK
from glm5_jax.remote import AnyPath
from glm5_jax.strict_json import read_json

# No model of this family comes near; more is a damaged file.
_MOST_LAYERS = 512
_MOST_EXPERTS = 4096
_MOST_EXPERTS_IN_ALL = 2**17  # each has names of its own
_DEEPEST = 64  # objects and lists within each other, which writers of JSON recurse into

# Published key -> place in `Config`, and what an absent key means (transformers' default).
_SIZES: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", REQUIRED),
    "hidden_size": ("dim", REQUIRED),
    "intermediate_size": ("dense_ffn", REQUIRED),
    "num_attention_heads": ("mla.num_heads", REQUIRED),
    "q_lora_rank": ("mla.q_rank", REQUIRED),
    "kv_lora_rank": ("mla.kv_rank", REQUIRED),
    "qk_nope_head_dim": ("mla.nope_dim", REQUIRED),
    "qk_rope_head_dim": ("mla.rope_dim", REQUIRED),
    "v_head_dim": ("mla.value_dim", REQUIRED),
    "index_n_heads": ("indexer.num_heads", REQUIRED),
    "index_head_dim": ("indexer.head_dim", REQUIRED),
    "index_topk": ("indexer.topk", REQUIRED),
    "n_routed_experts": ("moe.num_experts", REQUIRED),
    "num_experts_per_tok": ("moe.experts_per_token", REQUIRED),
    "moe_intermediate_size": ("moe.ffn", REQUIRED),
    "n_shared_experts": ("moe.num_shared_experts", 1),
    "n_group": ("moe.num_groups", 1),
    "topk_group": ("moe.groups_per_token", 1),
    "max_position_embeddings": ("max_positions", 202752),
}
_NUMBERS: dict[str, tuple[str, float]] = {
    "rms_norm_eps": ("norm_eps", 1e-5),
    "mla_norm_eps": ("mla.norm_eps", 1e-5),
    "routed_scaling_factor": ("moe.gate_scale", 2.5),
    "initializer_range": ("init_std", 0.02),
}
_FLAGS: dict[str, tuple[str, bool]] = {
    "indexer_rope_interleave": ("indexer.rope_interleave", True),
    "norm_topk_prob": ("moe.normalize_gates", True),
    "index_share_for_mtp_iteration": ("mtp_shares_selection", False),
}

# Keys with one supported value: another one would be a different model.
_FIXED: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0,
    "hidden_act": "silu",
    "mlp_bias": False,
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
}

# Keys that published files lack, or have as null or with the one supported value: switches of other
# implementations, and parts of related models.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hc_mult": (),
    "index_kpool": (),
    "indexer_compute_dtype": ("float32", "fp32"),
    "indexer_hadamard_fp8": (False,),
    "mla_use_nope": (False,),
    "moe_router_dtype": ("float32",),
    "mtp_hidden_post_final_norm": (True,),
    "mtp_mask_position_zero": (False,),
    "partial_rotary_factor": (1,),
    "rope_scaling": ({"rope_type": "default"}, {"type": "default"}),
    "sliding_window": (),
    "swiglu_limit": (),
    "use_qk_norm": (False,),
}

# Keys of the published files and of transformers' exports that do not change the model.
# `head_dim` is among them on purpose: it is 64 in GLM-5 and 192 in GLM-5.2, and RoPE rotates
# `qk_rope_head_dim` in both.
_HARMLESS = {
    "_name_or_path", "architectures", "bos_token_id", "chunk_size_feed_forward", "ep_size",
    "head_dim", "id2label", "is_encoder_decoder", "label2id", "output_attentions",
    "output_hidden_states", "output_router_logits", "pretraining_tp", "problem_type",
    "return_dict", "transformers_version", "use_cache",
}  # fmt: skip


class PublishedConfig(NamedTuple):
    """A `config.json` as read."""

    config: Config
    raw: dict[str, Any]  # the file's own keys and values
    unknown_keys: tuple[str, ...]  # keys that are neither used nor known to be harmless


def _mlp_kinds(keys: Keys, count: int) -> list[Literal["dense", "moe"]]:
    num_dense = keys.integer("first_k_dense_replace", 3, low=0)
    listed = keys.names("mlp_layer_types", ("dense", "sparse"), count)
    if listed is None:
        return ["dense" if layer < num_dense else "moe" for layer in range(count)]
    return ["dense" if name == "dense" else "moe" for name in listed]


def _indexer_kinds(keys: Keys, count: int) -> list[Literal["full", "shared"]]:
    """Explicit list, then pattern of F and S, then frequency and offset (IndexShare)."""
    pattern = keys.get("index_topk_pattern")
    if isinstance(pattern, list) and all(isinstance(letter, str) for letter in pattern):
        pattern = "".join(pattern)
    given = {key: value for key, value in keys.raw.items() if value is not None}
    period = max(Keys(given).integer("index_topk_freq", 1, low=0), 1)
    offset = Keys(given).integer("index_skip_topk_offset", 2, low=0)
    keys.used |= {"index_topk_freq", "index_skip_topk_offset"}
    listed = keys.names("indexer_types", ("full", "shared"), count)
    if listed is not None:
        return ["full" if name == "full" else "shared" for name in listed]
    if pattern is None:
        layers = range(count)
        return ["shared" if max(i - offset + 1, 0) % period else "full" for i in layers]
    if not isinstance(pattern, str) or len(pattern) != count or set(pattern) - {"F", "S"}:
        raise InputError(f"index_topk_pattern is {pattern!r:.80}, expected {count} letters F or S")
    return ["full" if letter == "F" else "shared" for letter in pattern]


def _rope_theta(keys: Keys) -> float:
    """The RoPE base, which newer files nest in `rope_parameters`."""
    nested = keys.get("rope_parameters")
    if nested is None:
        if "rope_theta" not in keys.raw:
            raise InputError("rope_parameters is missing, expected its rope_theta")
        return keys.number("rope_theta", 0.0)
    if not isinstance(nested, dict):
        raise InputError(f"rope_parameters is {nested!r:.80}, expected an object")
    rope = Keys(nested)
    rope.fixed("rope_type", "default")
    if "rope_theta" not in nested:
        raise InputError("rope_parameters.rope_theta is missing")
    theta = rope.number("rope_theta", 0.0)
    rope.neutral("partial_rotary_factor", 1)
    for key in sorted(set(nested) - rope.used):
        raise InputError(f"rope_parameters.{key} is {nested[key]!r:.80}, which is not supported")
    keys.fixed("rope_theta", theta)
    return theta


def _token_ids(keys: Keys, key: str) -> tuple[int, ...]:
    value = keys.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token) is not int or token < 0 for token in ids):
        raise InputError(f"{key} is {value!r:.80}, expected a token id or a list of them")
    return tuple(ids)


def _stored_dtype(keys: Keys) -> str:
    legacy = keys.get("torch_dtype")
    dtype = keys.get("dtype") or legacy or "bfloat16"
    if dtype not in ("float32", "float16", "bfloat16"):
        raise InputError(f"dtype is {dtype!r:.80}, expected float32, float16 or bfloat16")
    return str(dtype)


def _check_depth(raw: dict[str, Any]) -> None:
    level: list[Any] = [raw]
    for _ in range(_DEEPEST):
        held = (each.values() if isinstance(each, dict) else each for each in level)
        level = [part for parts in held for part in parts if isinstance(part, dict | list)]
    if level:
        raise InputError(f"is nested deeper than {_DEEPEST} objects and lists, expected a config")


def _check_quantization(keys: Keys) -> None:
    value = keys.get("quantization_config")
    if value is None:
        return
    if not isinstance(value, dict):
        raise InputError(f"quantization_config is {value!r:.80}, expected an object")
    quantization = Keys(value)
    quantization.fixed("quant_method", "fp8", required=True)
    quantization.neutral("weight_block_size", [BLOCK, BLOCK])


def parse_config(raw: dict[str, Any]) -> PublishedConfig:
    """Turns the object of a `config.json` into a `Config`.

    Raises:
      InputError: a key has an illegal value, or one that this implementation does not support.
    """
    _check_depth(raw)
    keys = Keys(raw)
    keys.fixed("model_type", "glm_moe_dsa", required=True)
    for key, expected in _FIXED.items():
        keys.fixed(key, expected)
    for key, accepted in _NEUTRAL.items():
        keys.neutral(key, *accepted)

    values: dict[str, dict[str, Any]] = {"": {}, "mla": {}, "indexer": {}, "moe": {}}

    def put(path: str, value: Any) -> None:
        group, _, field = path.rpartition(".")
        values[group][field] = value

    for key, (path, default) in _SIZES.items():
        high = _MOST_EXPERTS if key == "n_routed_experts" else LARGEST_SIZE
        put(path, keys.integer(key, default, high=high))
    for key, (path, number) in _NUMBERS.items():
        put(path, keys.number(key, number))
    for key, (path, flag) in _FLAGS.items():
        put(path, keys.flag(key, flag))

    count = keys.integer("num_hidden_layers", REQUIRED, high=_MOST_LAYERS)
    experts = values["moe"]["num_experts"]
    if count * experts > _MOST_EXPERTS_IN_ALL:
        raise InputError(
            f"n_routed_experts is {experts} in {count} layers, expected at most "
            f"{_MOST_EXPERTS_IN_ALL:,} experts in all"
        )
    kinds = zip(_mlp_kinds(keys, count), _indexer_kinds(keys, count), strict=True)
    pad_ids = _token_ids(keys, "pad_token_id")
    keys.names("layer_types", ("indexed_attention",), count)
    _check_quantization(keys)
    for alias in ("num_experts", "num_local_experts"):
        keys.neutral(alias, experts)
    mla = MlaConfig(**values["mla"])
    keys.fixed("num_key_value_heads", mla.num_heads)
    keys.fixed("qk_head_dim", mla.nope_dim + mla.rope_dim)

    config = Config(
        **values[""],
        layers=tuple(LayerKind(*kind) for kind in kinds),
        mla=mla,
        indexer=IndexerConfig(**values["indexer"]),
        moe=MoeConfig(**values["moe"]),
        num_mtp_layers=keys.integer("num_nextn_predict_layers", 0, low=0),
        rope_theta=_rope_theta(keys),
        eos_ids=_token_ids(keys, "eos_token_id"),
        pad_id=pad_ids[0] if pad_ids else None,
        dtype=_stored_dtype(keys),
    )
    unknown = tuple(sorted(set(raw) - keys.used - _HARMLESS))
    return PublishedConfig(config, raw, unknown)


def read_config(path: AnyPath) -> PublishedConfig:
    """Reads a `config.json`.

    Raises:
      InputError: the file is missing, is not JSON, or `parse_config` refuses it.
    """
    try:
        return parse_config(read_json(path))
    except InputError as error:
        message = str(error)
        raise InputError(message if str(path) in message else f"{path}: {message}") from None


def config_to_json(config: Config) -> dict[str, Any]:
    """The published form of a config; `parse_config` turns it back into an equal one."""
    tables: tuple[dict[str, tuple[str, Any]], ...] = (_SIZES, _NUMBERS, _FLAGS)
    fields = {
        key: operator.attrgetter(path)(config)
        for table in tables
        for key, (path, _) in table.items()
    }
    return {
        "architectures": ["GlmMoeDsaForCausalLM"],
        "model_type": "glm_moe_dsa",
        "dtype": config.dtype,
        **fields,
        "num_key_value_heads": config.mla.num_heads,
        "qk_head_dim": config.mla.nope_dim + config.mla.rope_dim,
        "num_hidden_layers": config.num_layers,
        "mlp_layer_types": ["dense" if kind.mlp == "dense" else "sparse" for kind in config.layers],
        "indexer_types": [kind.indexer for kind in config.layers],
        "num_nextn_predict_layers": config.num_mtp_layers,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "eos_token_id": list(config.eos_ids),
        "pad_token_id": config.pad_id,
        **{key: value for key, value in _FIXED.items() if value is not None},
    }
