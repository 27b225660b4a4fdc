"""Converted there and back, weights are what they were; what cannot be done is one line."""

import json
import os
import re
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from convert.__main__ import main
from glm5_jax import chunks
from tests.tiny import (
    GROUPED,
    SHARED,
    TINY,
    random_weights,
    write_published,
)

CONFIGS = {"full": TINY, "shared": SHARED, "grouped": GROUPED}


def tensor_bytes(directory):
    """Every tensor of a published directory as (dtype, shape, bytes)."""
    found = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            names = file.keys()
            for name in names:
                part = file.get_slice(name)
                value = file.get_tensor(name)
                found[name] = (part.get_dtype(), tuple(value.shape), value.tobytes())
    return found


def there_and_back(tmp_path, source, *options):
    assert main(["from-hf", str(source), str(tmp_path / "native")]) == 0
    assert main(["to-hf", str(tmp_path / "native"), str(tmp_path / "back"), *options]) == 0
    return tmp_path / "back"


@pytest.mark.parametrize("raw", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_tensors_come_back_byte_for_byte_under_their_names(tmp_path, raw, dtype):
    weights = {name: w.astype(dtype) for name, w in random_weights(raw).items()}
    bias = "model.layers.5.mlp.gate.e_score_correction_bias"
    weights |= {n: w.astype(np.float32) for n, w in weights.items() if n.endswith(bias[21:])}
    source = write_published(tmp_path / "source", raw, weights, num_shards=3)
    back = there_and_back(tmp_path, source)
    assert tensor_bytes(back) == tensor_bytes(source)
    assert json.loads((back / "config.json").read_text()) == raw


def test_weights_can_be_rounded_on_their_way_out(tmp_path):
    weights = random_weights(TINY)
    back = there_and_back(
        tmp_path, write_published(tmp_path / "source", TINY, weights), "--dtype", "bfloat16"
    )
    assert json.loads((back / "config.json").read_text()) == TINY | {"dtype": "bfloat16"}
    rounded = {
        name: w if name.endswith("e_score_correction_bias") else w.astype(jnp.bfloat16)
        for name, w in weights.items()
    }
    assert tensor_bytes(back) == tensor_bytes(write_published(tmp_path / "rounded", TINY, rounded))


def test_leaves_in_several_chunks_come_back_too(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 3000)
    source = write_published(tmp_path / "source", GROUPED, random_weights(GROUPED))
    back = there_and_back(tmp_path, source)
    assert tensor_bytes(back) == tensor_bytes(source)


def test_large_checkpoints_are_split_into_files_that_transformers_expects(tmp_path):
    source = write_published(tmp_path / "source", TINY, random_weights(TINY))
    back = there_and_back(tmp_path, source, "--shard-size", "300KB")
    shards = sorted(path.name for path in back.glob("*.safetensors"))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all((back / name).stat().st_size < 340_000 for name in shards)
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == shards
    assert index["metadata"]["total_size"] == sum(len(b) for *_, b in tensor_bytes(back).values())
    assert tensor_bytes(back) == tensor_bytes(source)


def test_check_reads_headers_only(tmp_path, capsys):
    source = write_published(tmp_path / "source", TINY, random_weights(TINY), num_shards=2)
    assert main(["check", str(source)]) == 0
    assert "273 tensors as expected" in capsys.readouterr().out


def test_unknown_keys_of_the_config_are_listed_once(tmp_path, capsys):
    source = write_published(tmp_path / "source", TINY | {"novelty": 1}, random_weights(TINY))
    assert main(["check", str(source)]) == 0
    assert capsys.readouterr().err.count("novelty") == 1


def test_files_that_the_index_does_not_name_are_listed(tmp_path, capsys):
    source = write_published(tmp_path / "source", TINY, random_weights(TINY), num_shards=2)
    (source / "model-00003-of-00002.safetensors").write_bytes(b"")
    assert main(["check", str(source)]) == 0
    assert "does not name: model-00003-of-00002.safetensors" in capsys.readouterr().err


def damage(directory, fault):
    file = directory / "model.safetensors"
    if fault == "missing directory":
        return directory / "nowhere"
    if fault == "no config":
        (directory / "config.json").unlink()
    elif fault == "damaged config":
        (directory / "config.json").write_text("{")
    elif fault == "unsupported config":
        (directory / "config.json").write_text(json.dumps(TINY | {"attention_bias": True}))
    elif fault == "truncated file":
        file.write_bytes(file.read_bytes()[:-100])
    elif fault == "damaged header":
        file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])
    elif fault == "other config":
        (directory / "config.json").write_text(json.dumps(TINY | {"hidden_size": 72}))
    return directory


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("missing directory", "nowhere: is not a directory"),
        ("no config", "config.json: No such file"),
        ("damaged config", "config.json: not valid JSON"),
        ("unsupported config", "attention_bias is True"),
        ("truncated file", "model.safetensors: not a valid safetensors file"),
        ("damaged header", "model.safetensors: not a valid safetensors file"),
        ("other config", "has shape"),
    ],
)
@pytest.mark.parametrize("command", ["from-hf", "check"])
def test_bad_input_is_one_line_and_leaves_nothing_behind(tmp_path, capsys, fault, named, command):
    source = write_published(tmp_path / "source", TINY, random_weights(TINY))
    source = damage(source, fault)
    destination = [str(tmp_path / "native")] if command == "from-hf" else []
    assert main([command, str(source), *destination]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    assert output.err.startswith("glm5-convert: error: ") and named in output.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("command", ["from-hf", "to-hf"])
def test_an_existing_destination_is_left_alone(tmp_path, capsys, command):
    source = write_published(tmp_path / "source", TINY, random_weights(TINY))
    main(["from-hf", str(source), str(tmp_path / "native")])
    (tmp_path / "there").write_text("precious")
    origin = {"from-hf": source, "to-hf": tmp_path / "native"}[command]
    assert main([command, str(origin), str(tmp_path / "there")]) == 2
    assert "there: exists already" in capsys.readouterr().err
    assert (tmp_path / "there").read_text() == "precious"


def test_a_damaged_native_checkpoint_is_not_exported(tmp_path, capsys):
    source = write_published(tmp_path / "source", TINY, random_weights(TINY))
    main(["from-hf", str(source), str(tmp_path / "native")])
    chunk = tmp_path / "native" / "params" / "head" / "0.0"
    chunk.write_bytes(chunk.read_bytes()[:-4] + b"\x00\x01\x02\x03")
    assert main(["to-hf", str(tmp_path / "native"), str(tmp_path / "back")]) == 2
    assert "leaf head, chunk 0.0: damaged" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["native", "source"]


@pytest.mark.parametrize("size", ["0", "-1GB", "five", "5XB"])
def test_a_senseless_shard_size_is_refused(tmp_path, size):
    with pytest.raises(SystemExit) as caught:
        main(["to-hf", str(tmp_path), str(tmp_path / "back"), f"--shard-size={size}"])
    assert caught.value.code == 2


def test_the_command_ends_with_status_2_and_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "convert", "from-hf", str(tmp_path / "no"), str(tmp_path / "x")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("glm5-convert: error: ") and done.stderr.count("\n") == 1


def test_a_pipe_is_no_tensor_file(tmp_path, capsys):
    source = write_published(tmp_path / "source", TINY, random_weights(TINY))
    (source / "model.safetensors").unlink()
    os.mkfifo(source / "model.safetensors")
    assert main(["check", str(source)]) == 2
    assert "model.safetensors: not a file" in capsys.readouterr().err


def test_the_layout_that_a_command_needs_is_named(tmp_path, capsys):
    source = write_published(tmp_path / "source", TINY, random_weights(TINY))
    assert main(["from-hf", str(source), str(tmp_path / "native")]) == 0
    assert main(["from-hf", str(tmp_path / "native"), str(tmp_path / "x")]) == 2
    assert "expected a published directory" in capsys.readouterr().err
    assert main(["to-hf", str(source), str(tmp_path / "x")]) == 2
    assert "expected a native checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(("place", "named"), [("source/x", "lies within"), ("file/x", "a file")])
def test_a_destination_that_cannot_be_is_named(tmp_path, capsys, place, named):
    source = write_published(tmp_path / "source", TINY, random_weights(TINY))
    (tmp_path / "file").touch()
    assert main(["from-hf", str(source), str(tmp_path / place)]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / place) in error and named in error


def test_a_disk_that_is_too_small_is_named_before_anything_is_written(
    tmp_path, capsys, monkeypatch
):
    source = write_published(tmp_path / "source", TINY, random_weights(TINY))
    native = tmp_path / "native"
    assert main(["from-hf", str(source), str(native)]) == 0
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    for command, origin in (("from-hf", source), ("to-hf", native)):
        assert main([command, str(origin), str(tmp_path / "new")]) == 2
        error = capsys.readouterr().err
        assert f"{tmp_path / 'new'}: 2,2" in error and "where 1,000,000 are free" in error
        assert {path.name for path in tmp_path.iterdir()} == {"source", "native"}


def test_a_plan_says_what_would_be_done_and_does_nothing(tmp_path, capsys):
    source = write_published(tmp_path / "source", TINY, random_weights(TINY), num_shards=3)
    native = tmp_path / "native"
    assert main(["from-hf", str(source), str(native), "--plan"]) == 0
    planned = capsys.readouterr().out
    assert not native.exists()
    assert main(["from-hf", str(source), str(native)]) == 0
    said = capsys.readouterr().out
    tensors, size = re.search(r": (\d+) tensors, ([\d,]+) bytes", said).groups()
    files = [path for path in native.rglob("*") if re.fullmatch(r"[\d.]+", path.name)]
    assert f"{tensors} tensors in 3 shards" in planned and f"{size} bytes to write" in planned
    assert f"{len(files)} chunks" in planned
    assert (
        f"{sum(p.stat().st_size for p in source.glob('*.safetensors')):,} bytes to read" in planned
    )

    options = ["--shard-size", "300KB"]
    assert main(["to-hf", str(native), str(tmp_path / "back"), "--plan", *options]) == 0
    planned = capsys.readouterr().out
    assert not (tmp_path / "back").exists()
    assert main(["to-hf", str(native), str(tmp_path / "back"), *options]) == 0
    shards = len(list((tmp_path / "back").glob("*.safetensors")))
    assert f"{tensors} tensors in {shards} shards" in planned
    assert f"{size} bytes to read" in planned and f"{size} bytes to write" in planned


def test_a_full_disk_is_one_line_that_names_the_destination(tmp_path):
    source = write_published(tmp_path / "source", TINY, random_weights(TINY))
    native = tmp_path / "native"
    assert main(["from-hf", str(source), str(native)]) == 0
    for command, origin in (("from-hf", source), ("to-hf", native)):
        words = f"{sys.executable} -m convert {command} {origin} {tmp_path / 'new'}"
        done = subprocess.run(
            ["bash", "-c", f"trap '' XFSZ; ulimit -f 20; exec {words}"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert f"{tmp_path / 'new'}: cannot be written" in done.stderr
        assert {path.name for path in tmp_path.iterdir()} == {"source", "native"}
