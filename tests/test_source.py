import json

import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.errors import InputError
from glm5_jax.load import load_model
from glm5_jax.params import leaves_by_path
from glm5_jax.published.files import INDEX_NAME
from glm5_jax.published.source import PublishedSource
from tests.tiny import SHARED, TINY, build_model, random_weights, write_published

EXPERT = "model.layers.4.mlp.experts.2.up_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def weights():
    return random_weights(TINY)


@pytest.mark.parametrize("num_shards", [1, 4])
def test_a_published_directory_loads_every_weight(tmp_path, weights, num_shards):
    directory = write_published(tmp_path, TINY, weights, num_shards)
    expected = leaves_by_path(build_model(TINY, weights))
    for leaf, loaded in leaves_by_path(load_model(directory)).items():
        np.testing.assert_array_equal(loaded, expected[leaf])


def test_pinned_weights_stay_float32_in_a_bfloat16_model(tmp_path, weights):
    model = load_model(write_published(tmp_path, TINY, weights), jnp.bfloat16)
    for leaf, loaded in leaves_by_path(model).items():
        assert loaded.dtype == (jnp.float32 if leaf.endswith("router.bias") else jnp.bfloat16)


def test_copies_of_embedding_and_head_are_accepted(tmp_path, weights):
    copies = {
        "model.layers.7.embed_tokens.weight": weights["model.embed_tokens.weight"],
        "model.layers.7.shared_head.head.weight": weights["lm_head.weight"],
    }
    load_model(write_published(tmp_path, TINY, weights | copies))


def test_an_mtp_layer_that_transformers_dropped_is_not_missed(tmp_path, weights):
    kept = {name: w for name, w in weights.items() if not name.startswith("model.layers.7.")}
    source = PublishedSource(write_published(tmp_path, TINY, kept))
    assert source.lacks_mtp and source.config.num_mtp_layers == 0
    assert load_model(tmp_path).mtp is None


def faulty(weights, fault):
    changed = dict(weights)
    if fault == "missing":
        del changed[EXPERT], changed[NORM]
    elif fault == "unknown":
        changed["model.layers.1.extra.weight"] = np.zeros(3, np.float32)
    elif fault == "indexer of a shared layer":
        changed["model.layers.9.self_attn.indexer.wk.weight"] = np.zeros((16, 64), np.float32)
    elif fault == "misshapen":
        changed[EXPERT] = changed[EXPERT].T
        changed[NORM] = changed[NORM][:-1]
    elif fault == "integer":
        changed[NORM] = changed[NORM].astype(np.int32)
    elif fault == "mixed":
        changed[NORM] = changed[NORM].astype(np.float16)
    elif fault == "float8 without scales":
        changed[EXPERT] = changed[EXPERT].astype(jnp.float8_e4m3fn)
    elif fault == "float8 vector":
        changed[NORM] = changed[NORM].astype(jnp.float8_e4m3fn)
    elif fault == "misshapen scales":
        changed[EXPERT] = changed[EXPERT].astype(jnp.float8_e4m3fn)
        changed[EXPERT + "_scale_inv"] = np.ones((2, 1), np.float32)
    elif fault == "bfloat16 scales":
        changed[EXPERT] = changed[EXPERT].astype(jnp.float8_e4m3fn)
        changed[EXPERT + "_scale_inv"] = np.ones((1, 1), jnp.bfloat16)
    elif fault == "scales of float32":
        changed[EXPERT + "_scale_inv"] = np.ones((1, 1), np.float32)
    return changed


FAULTS = {
    "missing": (f"{NORM} is missing", f"{EXPERT} is missing"),
    "unknown": ("model.layers.1.extra.weight is unknown",),
    "indexer of a shared layer": ("model.layers.9.self_attn.indexer.wk.weight is unknown",),
    "misshapen": (
        f"{NORM} has shape [63], expected [64]",
        f"{EXPERT} has shape [64, 32], expected [32, 64]",
    ),
    "integer": (f"{NORM} has dtype I32, expected one of",),
    "mixed": (f"{NORM} has dtype F16, expected F32 as in other layers",),
    "float8 without scales": (f"{EXPERT} has dtype F8_E4M3 but no _scale_inv",),
    "float8 vector": (f"{NORM} has dtype F8_E4M3, which only matrices may have",),
    "misshapen scales": (f"{EXPERT} has F32 scales of shape [2, 1], expected F32 of [1, 1]",),
    "bfloat16 scales": (f"{EXPERT} has BF16 scales",),
    "scales of float32": (f"{EXPERT}_scale_inv is unknown",),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_tensors_are_all_named(tmp_path, weights, fault):
    write_published(tmp_path, TINY, faulty(weights, fault))
    with pytest.raises(InputError) as caught:
        PublishedSource(tmp_path)
    for phrase in FAULTS[fault]:
        assert phrase in str(caught.value)


def test_many_faults_of_one_kind_share_a_phrase(tmp_path, weights):
    kept = {name: w for name, w in weights.items() if ".experts." not in name}
    write_published(tmp_path, TINY, kept)
    with pytest.raises(InputError) as caught:
        PublishedSource(tmp_path)
    message = str(caught.value)
    assert "model.layers.*.mlp.experts.*.gate_proj.weight (40 tensors, such as" in message
    assert len(message) < 1000


def test_a_shared_layer_with_an_indexer_is_refused(tmp_path, weights):
    write_published(tmp_path, SHARED, weights)
    with pytest.raises(InputError, match=r"layers\.3\.self_attn\.indexer.* is unknown"):
        PublishedSource(tmp_path)


def edit_index(directory, edit):
    path = directory / INDEX_NAME
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", "", "..", 3]
)
def test_an_index_may_name_plain_safetensors_files_only(tmp_path, weights, name):
    write_published(tmp_path, TINY, weights, 2)
    edit_index(tmp_path, lambda weight_map: weight_map.update({NORM: name}))
    with pytest.raises(InputError, match="expected the plain name"):
        PublishedSource(tmp_path)


def test_a_shard_that_leads_out_of_the_directory_is_refused(tmp_path, weights):
    directory = write_published(tmp_path / "model", TINY, weights, 2)
    shard = directory / "model-00001-of-00002.safetensors"
    shard.rename(tmp_path / "elsewhere.safetensors")
    shard.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(InputError, match="leads out of the directory"):
        PublishedSource(directory)


def test_the_links_of_the_hugging_face_cache_are_followed(tmp_path, weights):
    directory = write_published(tmp_path / "snapshots" / "abc", TINY, weights, 2)
    (tmp_path / "blobs").mkdir()
    for shard in directory.glob("*.safetensors"):
        shard.rename(tmp_path / "blobs" / shard.stem)
        shard.symlink_to(tmp_path / "blobs" / shard.stem)
    load_model(directory)


def test_an_absent_shard_is_named(tmp_path, weights):
    write_published(tmp_path, TINY, weights, 3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00003\.safetensors missing"):
        PublishedSource(tmp_path)


def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path, weights):
    write_published(tmp_path, TINY, weights, 2)

    def edit(weight_map):
        del weight_map[NORM]
        weight_map["ghost"] = "model-00001-of-00002.safetensors"

    edit_index(tmp_path, edit)
    with pytest.raises(InputError) as caught:
        PublishedSource(tmp_path)
    assert f"{NORM} is not listed" in str(caught.value)
    assert "ghost is not in model-00001-of-00002.safetensors" in str(caught.value)


def test_every_file_that_is_damaged_is_named(tmp_path, weights):
    write_published(tmp_path, TINY, weights, 5)
    for number, cut in ((2, 10), (4, -7)):
        path = tmp_path / f"model-0000{number}-of-00005.safetensors"
        path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError) as caught:
        PublishedSource(tmp_path)
    said = str(caught.value)
    assert "model-00002-of-00005.safetensors: not a valid" in said
    assert "model-00004-of-00005.safetensors: not a valid" in said and "00003" not in said


def test_every_name_of_an_index_that_leads_elsewhere_is_named(tmp_path, weights):
    write_published(tmp_path, TINY, weights, 2)
    experts = [name for name in weights if "experts" in name]
    edit_index(tmp_path, lambda weight_map: weight_map.update(dict.fromkeys(experts, "../x")))
    edit_index(tmp_path, lambda weight_map: weight_map.update({NORM: "/etc/passwd"}))
    with pytest.raises(InputError) as caught:
        PublishedSource(tmp_path)
    said = str(caught.value)
    assert "experts.*.up_proj.weight (40 tensors" in said and "'/etc/passwd'" in said
    assert len(said) < 2000


def test_an_index_that_lists_half_is_one_short_line(tmp_path, weights):
    write_published(tmp_path, TINY, weights, 2)

    def forget(weight_map):
        for name in list(weight_map)[::2]:
            del weight_map[name]

    edit_index(tmp_path, forget)
    with pytest.raises(InputError) as caught:
        PublishedSource(tmp_path)
    assert "tensors, such as" in str(caught.value) and len(str(caught.value)) < 6000


def test_a_tensor_in_two_files_is_refused(tmp_path, weights):
    write_published(tmp_path, TINY, weights, 2)
    first = write_published(tmp_path / "again", TINY, weights) / "model.safetensors"
    first.rename(tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(InputError, match=r"model\.norm\.weight stands in 2 files"):
        PublishedSource(tmp_path)


def test_a_directory_without_tensors_says_what_was_looked_for(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    with pytest.raises(InputError, match=r"neither model\.safetensors nor"):
        load_model(tmp_path)


@pytest.mark.parametrize("kind", ["missing", "file", "empty"])
def test_what_is_no_checkpoint_directory_is_named(tmp_path, kind):
    path = tmp_path / "model"
    if kind == "file":
        path.touch()
    elif kind == "empty":
        path.mkdir()
    with pytest.raises(InputError, match=str(path)):
        load_model(path)
