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
from convert.finite import num_not_finite
from glm5_jax import chunks
from glm5_jax.checkpoint import restore_checkpoint
from glm5_jax.load import load_model
from glm5_jax.params import leaves_by_path
from tests.tiny import (
    GROUPED,
    SHARED,
    TINY,
    WIDE,
    build_model,
    float8_weights,
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


@pytest.mark.parametrize("option", [[], ["--float8-as", "float32"]])
def test_float8_is_multiplied_out(tmp_path, option):
    raw = WIDE | {"dtype": "bfloat16"}
    published, values = float8_weights(random_weights(raw))
    published = {
        n: w.astype(jnp.bfloat16) if w.dtype == np.float32 and "scale" not in n else w
        for n, w in published.items()
    }
    raw |= {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    source = write_published(tmp_path / "source", raw, published, num_shards=2)
    assert main(["from-hf", str(source), str(tmp_path / "native"), *option]) == 0
    dtype = jnp.float32 if option else jnp.bfloat16
    loaded = leaves_by_path(load_model(tmp_path / "native", jnp.float32))
    expected = leaves_by_path(build_model(raw, {n: w.astype(dtype) for n, w in values.items()}))
    quantized = [leaf for leaf in loaded if "q_up" in leaf or "kv_down" in leaf or ".gate" in leaf]
    assert len(quantized) > 5
    for leaf in quantized:
        np.testing.assert_array_equal(loaded[leaf], expected[leaf].astype(jnp.float32))
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    assert "quantization_config" not in config


def test_copies_in_the_mtp_layer_must_be_copies(tmp_path, capsys):
    weights = random_weights(TINY)
    copy = {"model.layers.7.shared_head.head.weight": weights["lm_head.weight"].copy()}
    source = write_published(tmp_path / "good", TINY, weights | copy)
    assert main(["from-hf", str(source), str(tmp_path / "native")]) == 0
    copy["model.layers.7.shared_head.head.weight"][50, 3] += 1e-3
    source = write_published(tmp_path / "bad", TINY, weights | copy)
    assert main(["from-hf", str(source), str(tmp_path / "other")]) == 2
    assert "shared_head.head.weight differs from lm_head.weight" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_diff_of_equal_checkpoints_is_empty_whatever_their_layout(tmp_path, capsys):
    source = write_published(tmp_path / "source", TINY, random_weights(TINY), num_shards=2)
    back = there_and_back(tmp_path, source)
    native = tmp_path / "native"
    for first, second in ((source, back), (source, native), (native, back), (native, native)):
        assert main(["diff", str(first), str(second)]) == 0
    assert "0 differences, largest between values 0" in capsys.readouterr().out


def test_diff_names_what_differs(tmp_path, capsys):
    weights = random_weights(TINY)
    first = write_published(tmp_path / "first", TINY, weights)
    changed = {n: w.copy() for n, w in weights.items() if not n.startswith("model.layers.7.")}
    changed["model.norm.weight"][7] += 0.25
    changed["lm_head.weight"][3, 4] = np.nan
    changed["model.layers.1.mlp.up_proj.weight"] = (
        weights["model.layers.1.mlp.up_proj.weight"].astype(np.float64).astype(np.float32)
    )
    second = write_published(tmp_path / "second", TINY, changed)
    assert main(["diff", str(first), str(second)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "model.norm.weight: values by up to 0.25" in lines
    assert "lm_head.weight: values by up to inf" in lines
    assert f"model.layers.7.enorm.weight: only in {first}" in lines
    assert not any("up_proj" in line and "layers.1." in line for line in lines)


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


def test_diff_puts_many_of_a_kind_in_a_line(tmp_path, capsys):
    weights = random_weights(TINY)
    first = write_published(tmp_path / "first", TINY, weights)
    changed = dict(weights)
    for expert in range(8):
        name = f"model.layers.4.mlp.experts.{expert}.up_proj.weight"
        changed[name] = weights[name] + np.float32(expert)
    second = write_published(tmp_path / "second", TINY | {"rms_norm_eps": 1e-6}, changed)
    assert main(["diff", str(first), str(second)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "config.json, rms_norm_eps: 1e-05 and 1e-06"
    assert "(7 tensors, such as model.layers.4.mlp.experts.1.up_proj.weight)" in lines[1]
    assert lines[1].endswith(": values by up to 7") and "8 differences" in lines[2]


@pytest.mark.filterwarnings("error")
def test_diff_tells_infinities_and_signs_of_zero_apart(tmp_path, capsys):
    weights = {name: w.copy() for name, w in random_weights(TINY).items()}
    weights["model.norm.weight"][:3] = np.inf, np.inf, 0.0
    weights["lm_head.weight"][0, 0] = 0.0
    first = write_published(tmp_path / "first", TINY, weights)
    changed = {name: w.copy() for name, w in weights.items()}
    changed["model.norm.weight"][1] = 1.0
    changed["lm_head.weight"][0, 0] = -0.0
    second = write_published(tmp_path / "second", TINY, changed)
    assert main(["diff", str(first), str(second)]) == 1
    assert {*capsys.readouterr().out.splitlines()[:2]} == {
        "model.norm.weight: values by up to inf",
        "lm_head.weight: equal values in other bits",
    }


def test_float8_does_not_differ_from_what_it_is_converted_to(tmp_path, capsys):
    raw = WIDE | {"dtype": "bfloat16"}
    published, _ = float8_weights(random_weights(raw))
    source = write_published(tmp_path / "source", raw, published)
    assert main(["from-hf", str(source), str(tmp_path / "native")]) == 0
    assert main(["diff", str(source), str(tmp_path / "native")]) == 0
    assert main(["diff", str(tmp_path / "native"), str(source)]) == 0


def test_a_leaf_of_float8_and_others_takes_the_wider_dtype(tmp_path):
    raw = WIDE | {"dtype": "bfloat16"}
    published, _ = float8_weights(random_weights(raw))
    name = "model.layers.4.mlp.experts.1.up_proj.weight"
    del published[name + "_scale_inv"]
    published[name] = random_weights(raw)[name].astype(jnp.bfloat16)
    source = write_published(tmp_path / "source", raw, published)
    assert main(["from-hf", str(source), str(tmp_path / "a"), "--float8-as", "float32"]) == 0
    leaves = leaves_by_path(restore_checkpoint(tmp_path / "a"))
    assert leaves["segments.1.experts.0.up"].dtype == jnp.float32


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0])
def test_a_senseless_scale_is_named(tmp_path, capsys, scale):
    published, _ = float8_weights(random_weights(WIDE))
    name = "model.layers.1.self_attn.q_b_proj.weight_scale_inv"
    published[name][0, 1] = scale
    source = write_published(tmp_path / "source", WIDE, published)
    assert main(["from-hf", str(source), str(tmp_path / "native")]) == 2
    assert f"{name} is {scale} at [0, 1]" in capsys.readouterr().err
    assert not (tmp_path / "native").exists()


def test_a_scale_of_zero_is_named_unless_its_weights_are_zeros(tmp_path, capsys):
    published, _ = float8_weights(random_weights(WIDE))
    names = [f"model.layers.1.self_attn.{part}_proj.weight" for part in ("q_b", "kv_b")]
    for name in names:
        published[name + "_scale_inv"][-1, 0] = 0
    published[names[1]][128 * (len(published[names[1] + "_scale_inv"]) - 1) :] = 0
    source = write_published(tmp_path / "source", WIDE, published)
    assert main(["from-hf", str(source), str(tmp_path / "native")]) == 2
    error = capsys.readouterr().err
    assert f"{names[0]}_scale_inv is 0.0 at" in error and names[1] not in error
    published[names[0] + "_scale_inv"][-1, 0] = 1
    source = write_published(tmp_path / "source", WIDE, published)
    assert main(["from-hf", str(source), str(tmp_path / "native")]) == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16, jnp.float8_e4m3fn])
def test_weights_that_are_not_finite_are_counted(dtype):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 700_000)).astype(dtype)
    assert num_not_finite(values) == 0
    values[1, ::1000] = np.nan
    values[2, :7] = -np.inf  # of which float8 has none
    assert num_not_finite(values) == np.count_nonzero(~np.isfinite(values.astype(np.float32)))
    assert num_not_finite(values[:0]) == 0


def test_weights_that_are_not_finite_are_named_and_refused_if_asked(tmp_path, capsys):
    weights = random_weights(TINY)
    expert = "model.layers.4.mlp.experts.{}.up_proj.weight"
    for number in range(8):
        weights[expert.format(number)][3, :number] = np.nan
    weights["model.norm.weight"][0] = np.inf
    source = write_published(tmp_path / "source", TINY, weights, num_shards=3)
    assert main(["from-hf", str(source), str(tmp_path / "x"), "--strict"]) == 2
    error = capsys.readouterr().err
    assert "model.layers.*.mlp.experts.*.up_proj.weight (7 tensors, such as " in error
    assert "has weights that are NaN or infinite (28)" in error
    assert "model.norm.weight has weights that are NaN or infinite (1)" in error
    assert not (tmp_path / "x").exists()
    assert main(["from-hf", str(source), str(tmp_path / "x")]) == 0  # what was done is not lost
    assert "3 of 3 shards are done already" in (error := capsys.readouterr().err)
    assert "NaN or infinite (28)" in error


def test_float8_that_overflows_is_named(tmp_path, capsys):
    published, _ = float8_weights(random_weights(WIDE))
    name = "model.layers.1.self_attn.q_b_proj.weight"
    published[name + "_scale_inv"][0, 0] = 3e38
    source = write_published(tmp_path / "source", WIDE, published)
    assert main(["from-hf", str(source), str(tmp_path / "x"), "--strict"]) == 2
    error = capsys.readouterr().err
    assert f"{name} has weights that are NaN or infinite" in error and error.count("\n") == 1


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
