import json

import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.checkpoint import restore_checkpoint, save_checkpoint
from glm5_jax.errors import InputError
from glm5_jax.params import leaves_by_path
from tests.tiny import GROUPED, SHARED, TINY, random_model

CONFIGS = {"full": TINY, "shared": SHARED, "grouped": GROUPED}


def assert_equal(first, second):
    ours, theirs = leaves_by_path(first), leaves_by_path(second)
    assert ours.keys() == theirs.keys()
    for leaf in ours:
        assert ours[leaf].dtype == theirs[leaf].dtype
        np.testing.assert_array_equal(ours[leaf], theirs[leaf])


@pytest.mark.parametrize("raw", CONFIGS.values(), ids=CONFIGS)
def test_a_model_comes_back_as_it_was_saved(tmp_path, raw):
    model = random_model(raw)
    save_checkpoint(tmp_path / "model", model)
    restored = restore_checkpoint(tmp_path / "model")
    assert restored.config == model.config
    assert_equal(restored, model)


def test_weights_are_converted_only_when_asked_and_pinned_ones_never(tmp_path):
    model = random_model()
    save_checkpoint(tmp_path / "model", model)
    for leaf, array in leaves_by_path(restore_checkpoint(tmp_path / "model")).items():
        assert array.dtype == jnp.float32, leaf
    narrow = restore_checkpoint(tmp_path / "model", jnp.bfloat16)
    for leaf, array in leaves_by_path(narrow).items():
        assert array.dtype == (jnp.float32 if leaf.endswith("router.bias") else jnp.bfloat16)


def test_tokenizer_files_travel_along(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "tokenizer.json").write_text("{}")
    (tmp_path / "text" / "notes.txt").write_text("")
    save_checkpoint(tmp_path / "model", random_model(), tmp_path / "text")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names == {"config.json", "params", "tokenizer.json"}


def test_an_existing_destination_is_left_alone(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(InputError, match="exists already"):
        save_checkpoint(tmp_path / "model", random_model())
    assert list(tmp_path.rglob("*")) == [tmp_path / "model"]


def test_a_failed_save_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("glm5_jax.tree_writer.TreeWriter.commit", fail)
    with pytest.raises(InputError, match="model: cannot be written: No space left"):
        save_checkpoint(tmp_path / "model", random_model())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": 32}, r"leaf embedding has shape \[97, 64\], expected \[97, 32\]"),
        ({"num_nextn_predict_layers": 0}, "leaf mtp.norm is unknown"),
        ({"indexer_types": ["full"] * 6 + ["shared"]}, "is missing"),
    ],
)
def test_a_checkpoint_that_is_not_of_its_config_is_refused(tmp_path, change, named):
    save_checkpoint(tmp_path / "model", random_model())
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    manifest = tmp_path / "model" / "params" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"beside": {}}))
    with pytest.raises(InputError, match=named):
        restore_checkpoint(tmp_path / "model")


def test_a_changed_config_is_refused_unless_the_change_is_meant(tmp_path):
    save_checkpoint(tmp_path / "model", random_model())
    path = tmp_path / "model" / "config.json"
    path.write_text(path.read_text().replace("rms_norm_eps", "rms_morn_eps"))
    with pytest.raises(InputError, match=r"config\.json: not as it was written"):
        restore_checkpoint(tmp_path / "model")


def test_a_flipped_bit_is_named_with_its_leaf(tmp_path):
    save_checkpoint(tmp_path / "model", random_model())
    path = tmp_path / "model" / "params" / "segments.1.experts.0.up" / "1.5.0.0"
    data = bytearray(path.read_bytes())
    data[100] ^= 4
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"leaf segments\.1\.experts\.0\.up, chunk 1\.5\.0\.0"):
        restore_checkpoint(tmp_path / "model")
