import json

import pytest

from glm5_jax.config_json import config_to_json, parse_config, read_config
from glm5_jax.errors import InputError
from glm5_jax.presets import PRESETS, load_preset
from tests.tiny import GROUPED, TINY, tiny_config


def indexers(raw):
    return "".join(kind.indexer[0].upper() for kind in tiny_config(raw).layers)


def without(raw, *keys):
    return {key: value for key, value in raw.items() if key not in keys}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_being_written_and_read(name):
    config = load_preset(name).config
    written = json.loads(json.dumps(config_to_json(config)))
    assert parse_config(written).config == config


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_no_unknown_keys(name):
    assert load_preset(name).unknown_keys == ()


def test_glm52_has_21_full_layers_and_its_own_rope_base():
    config = load_preset("glm-5.2").config
    full = [i for i, kind in enumerate(config.layers) if kind.indexer == "full"]
    assert full == [0, 1, 2, *range(6, 78, 4)]
    assert config.rope_theta == 8e6
    assert config.mla.rope_dim == 64  # head_dim says 192 there
    assert config.mtp_shares_selection


def test_an_explicit_list_of_indexers_goes_before_pattern_and_frequency():
    keys = {"index_topk_pattern": "FFFFFFF", "index_topk_freq": 2}
    assert indexers(TINY | keys | {"indexer_types": ["full", *["shared"] * 6]}) == "FSSSSSS"


def test_a_pattern_of_indexers_goes_before_frequency():
    raw = without(TINY, "indexer_types")
    assert indexers(raw | {"index_topk_pattern": "FSFSSFS", "index_topk_freq": 4}) == "FSFSSFS"


@pytest.mark.parametrize(
    ("frequency", "offset", "expected"),
    [(1, 2, "FFFFFFF"), (4, 3, "FFFSSSF"), (2, 2, "FFSFSFS"), (3, 0, "SSFSSFS"), (0, 2, "FFFFFFF")],
)
def test_frequency_and_offset_count_layers_from_zero(frequency, offset, expected):
    raw = without(TINY, "indexer_types")
    raw = raw | {"index_topk_freq": frequency, "index_skip_topk_offset": offset}
    if expected[0] == "S":
        with pytest.raises(InputError, match="indexer_types"):
            tiny_config(raw)
    else:
        assert indexers(raw) == expected


def test_all_layers_are_full_where_no_key_says_otherwise():
    assert indexers(without(TINY, "indexer_types")) == "FFFFFFF"


def test_the_first_layers_are_dense_where_layers_are_not_listed():
    raw = without(TINY, "mlp_layer_types") | {"first_k_dense_replace": 2}
    assert [kind.mlp for kind in tiny_config(raw).layers] == ["dense"] * 2 + ["moe"] * 5


def test_head_dim_does_not_bear_on_rope():
    assert tiny_config(TINY | {"head_dim": 192}) == tiny_config(TINY)


def test_rope_base_may_stand_outside_rope_parameters():
    raw = without(TINY, "rope_parameters") | {"rope_theta": 5e5}
    assert tiny_config(raw).rope_theta == 5e5


def test_a_missing_rope_base_is_an_error_and_not_a_default():
    with pytest.raises(InputError, match="rope_parameters"):
        tiny_config(without(TINY, "rope_parameters"))


def test_latent_norm_epsilon_defaults_to_that_of_the_training_stack():
    assert tiny_config().mla.norm_eps == 1e-5
    assert tiny_config(TINY | {"mla_norm_eps": 1e-6}).mla.norm_eps == 1e-6


def test_harmless_unknown_keys_are_listed_and_not_fatal():
    published = parse_config(TINY | {"zeta": 1, "alpha": {"a": 2}, "transformers_version": "5"})
    assert published.unknown_keys == ("alpha", "zeta")


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("attention_bias", True, "attention_bias"),
        ("attention_dropout", 0.1, "attention_dropout"),
        ("hidden_act", "gelu", "hidden_act"),
        ("mlp_bias", True, "mlp_bias"),
        ("moe_layer_freq", 2, "moe_layer_freq"),
        ("model_type", "glm5_next", "glm5_next"),
        ("model_type", "deepseek_v32", "deepseek_v32"),
        ("rope_interleave", False, "rope_interleave"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4}, "rope_scaling"),
        ("rope_parameters", {"rope_theta": 1e6, "rope_type": "yarn"}, "rope_type is 'yarn'"),
        ("rope_parameters", {"rope_theta": 1e6, "factor": 4}, r"rope_parameters\.factor"),
        ("scoring_func", "softmax", "scoring_func"),
        ("tie_word_embeddings", True, "tie_word_embeddings"),
        ("topk_method", "greedy", "topk_method"),
        ("quantization_config", {"quant_method": "gptq"}, "quant_method"),
        ("quantization_config", "fp8", "quantization_config is 'fp8', expected an object"),
        ("quantization_config", {}, "quant_method is missing"),
        (
            "quantization_config",
            {"quant_method": "fp8", "weight_block_size": [64, 64]},
            "weight_block_size",
        ),
        ("mtp_mask_position_zero", True, "mtp_mask_position_zero"),
        ("mtp_hidden_post_final_norm", False, "mtp_hidden_post_final_norm"),
        ("indexer_hadamard_fp8", True, "indexer_hadamard_fp8"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor"),
        ("sliding_window", 4096, "sliding_window"),
        ("swiglu_limit", 7.0, "swiglu_limit"),
        ("num_local_experts", 3, "num_local_experts is 3"),
        ("num_key_value_heads", 2, "num_key_value_heads"),
        ("qk_head_dim", 24, "qk_head_dim"),
    ],
)
def test_a_key_that_would_change_the_model_is_refused_by_name(key, value, named):
    with pytest.raises(InputError, match=named):
        tiny_config(TINY | {key: value})


@pytest.mark.parametrize(
    "changes",
    [
        {"moe_router_dtype": None, "rope_scaling": {"rope_type": "default"}},
        {"rope_parameters": TINY["rope_parameters"] | {"partial_rotary_factor": 1.0}},
        {"index_topk_freq": None, "index_skip_topk_offset": None},
        {"indexer_types": None, "index_topk_pattern": ["F"] * 7},
        {"num_local_experts": TINY["n_routed_experts"], "sliding_window": None},
        {"mtp_hidden_post_final_norm": True, "quantization_config": {"quant_method": "fp8"}},
    ],
)
def test_values_that_change_nothing_are_accepted(changes):
    published = parse_config(TINY | changes)
    assert published.config == tiny_config(TINY | {"indexer_types": None})
    assert published.unknown_keys == ()


def test_a_config_of_no_model_type_is_refused():
    with pytest.raises(InputError, match="model_type is missing"):
        parse_config({key: value for key, value in TINY.items() if key != "model_type"})


def test_more_experts_than_any_model_has_are_refused():
    with pytest.raises(InputError, match="n_routed_experts"):
        tiny_config(TINY | {"n_routed_experts": 2**24})


@pytest.mark.parametrize("value", [10**400, -1, 0, "1", True])
def test_numbers_must_be_positive_and_finite(value):
    with pytest.raises(InputError, match="rms_norm_eps"):
        tiny_config(TINY | {"rms_norm_eps": value})


@pytest.mark.parametrize("value", [True, 0, -1, 6144.0, "64", None, 2**40])
def test_sizes_must_be_integers_within_bounds(value):
    with pytest.raises(InputError, match="hidden_size"):
        tiny_config(TINY | {"hidden_size": value})


def test_too_many_layers_are_refused_before_anything_is_built():
    with pytest.raises(InputError, match="num_hidden_layers"):
        tiny_config(TINY | {"num_hidden_layers": 10**6})


@pytest.mark.parametrize(
    "changes",
    [
        {"n_group": 3},
        {"n_group": 8, "topk_group": 1},
        {"topk_group": 5, "n_group": 4},
        {"num_experts_per_tok": 9},
        {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3},
        {"qk_rope_head_dim": 7, "qk_head_dim": 19},
        {"index_head_dim": 4},
        {"num_nextn_predict_layers": 2},
        {"indexer_types": ["full"] * 6},
        {"indexer_types": ["full"] * 6 + ["half"]},
        {"mlp_layer_types": ["dense"] * 8},
        {"index_topk_pattern": "FFX", "indexer_types": None},
        {"rms_norm_eps": 0},
        {"eos_token_id": ["stop"]},
    ],
)
def test_impossible_sizes_are_refused(changes):
    with pytest.raises(InputError):
        tiny_config(GROUPED | {"n_group": 1, "topk_group": 1} | changes)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object"),
        ('{"hidden_size": 1, "hidden_size": 2}', "stands twice"),
        ('{"rms_norm_eps": NaN}', "not finite"),
        ('{"rms_norm_eps": 1e999}', "number 1e999 is not finite"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_damaged_file_is_one_error_that_names_it(tmp_path, text, expected):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(InputError, match=expected) as caught:
        read_config(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"config\.json"):
        read_config(tmp_path / "config.json")


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(InputError, match=r"glm-5\.2"):
        load_preset("glm-6")
