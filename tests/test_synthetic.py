import json
import shutil
import time

import numpy as np
import pytest

from convert.__main__ import main
from glm5_jax.load import load_model
from glm5_jax.params import leaves_by_path
from tests.tiny import WIDE

# Names of tensors and scales, bytes of weights, and files, as they were published.
PUBLISHED = [
    ("glm-5", False, 59_870, 59_870, 1_507_728_316_928, 282),
    ("glm-5", True, 59_870, 119_028, 756_162_687_872, 142),
    ("glm-5.2", False, 59_585, 59_585, 1_506_659_919_872, 282),
    ("glm-5.2", True, 59_585, 118_629, 755_617_140_416, 141),
]


@pytest.mark.parametrize(("preset", "float8", "tensors", "keys", "size", "shards"), PUBLISHED)
def test_a_checkpoint_of_full_size_has_what_the_published_one_has(
    tmp_path, capsys, preset, float8, tensors, keys, size, shards
):
    arguments = ["synthesize", str(tmp_path / "x"), "--config", preset, "--holes"]
    assert main([*arguments, *(["--float8"] if float8 else [])]) == 0
    assert f"{size:,} bytes" in capsys.readouterr().out
    files = list((tmp_path / "x").glob("*.safetensors"))
    assert len(files) == shards
    assert sum(path.stat().st_blocks for path in files) * 512 < 2**26  # the rest are holes
    index = json.loads((tmp_path / "x" / "model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == keys
    begun = time.process_time()
    assert main(["check", str(tmp_path / "x")]) == 0
    assert time.process_time() - begun < 60
    assert f"{tensors} tensors as expected" in capsys.readouterr().out


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(WIDE))
    return path


@pytest.mark.parametrize("float8", [False, True])
def test_made_up_weights_load(tmp_path, config, float8):
    arguments = ["synthesize", str(tmp_path / "x"), "--config", str(config), "--shard-size", "1MB"]
    assert main([*arguments, *(["--float8"] if float8 else [])]) == 0
    for leaf, array in leaves_by_path(load_model(tmp_path / "x", np.float32)).items():
        assert np.isfinite(array).all() and len(np.unique(array)) > 0.5 * min(array.size, 100), leaf


def test_keys_of_the_config_can_be_changed(tmp_path, config):
    arguments = ["synthesize", str(tmp_path / "x"), "--config", str(config), "--holes"]
    assert main([*arguments, "--set", "vocab_size=123", "--set", "dtype=bfloat16"]) == 0
    raw = json.loads((tmp_path / "x" / "config.json").read_text())
    assert raw == WIDE | {"vocab_size": 123, "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--set", "vocab_size"], "expected KEY=VALUE"),
        (["--set", "vocab_size=-1"], "vocab_size"),
        (["--set", "hiden_size=64"], "--set 'hiden_size': the model has no such key"),
        (["--set", "rope_theta=" + 5000 * "["], "expected KEY=VALUE, VALUE in JSON"),
        (["--set", "rope_theta=1e999"], "rope_theta is '1e999'"),
        (["--config", "glm-4"], "expected one of"),
        (["--shard-size", "0"], "expected one like 5GB"),
    ],
)
def test_what_cannot_be_made_is_one_line(tmp_path, capsys, option, said):
    try:
        status = main(["synthesize", str(tmp_path / "x"), *option])
    except SystemExit as ended:
        status = ended.code
    error = capsys.readouterr().err
    assert status == 2 and said in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_converting_it_back_gives_the_same_files(tmp_path, config):
    arguments = ["synthesize", str(tmp_path / "x"), "--config", str(config), "--shard-size", "1MB"]
    assert main([*arguments, "--set", "dtype=bfloat16"]) == 0
    assert main(["from-hf", str(tmp_path / "x"), str(tmp_path / "native")]) == 0
    back = ["to-hf", str(tmp_path / "native"), str(tmp_path / "back"), "--shard-size", "1MB"]
    assert main(back) == 0
    files = sorted((tmp_path / "x").glob("model*"))
    assert len(files) > 3
    for path in files:
        assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes()


def test_what_the_disk_has_no_room_for_is_not_begun(tmp_path, config, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    arguments = ["synthesize", str(tmp_path / "x"), "--config", str(config)]
    assert main(arguments) == 2
    assert "bytes are to be written, where 1,000 are free" in capsys.readouterr().err
    assert main([*arguments, "--holes"]) == 0
