import json
import random

import numpy as np
import pytest

from convert.__main__ import main
from tests.tiny import TINY, WIDE, float8_weights, random_weights, write_published

SHARDS = ["--shard-size", "200KB"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A published checkpoint, the native one made of it, and the published one made of that."""
    folder = tmp_path_factory.mktemp("made")
    published, _ = float8_weights(random_weights(WIDE))
    write_published(folder / "source", WIDE, published, num_shards=3)
    (folder / "source" / "README.md").write_text("# A model")
    assert main(["from-hf", str(folder / "source"), str(folder / "native")]) == 0
    assert main(["to-hf", str(folder / "native"), str(folder / "back"), *SHARDS]) == 0
    return folder


def verify(*arguments):
    return main(["verify", *map(str, arguments)])


def test_what_was_made_is_sound(made, capsys):
    pairs = [("native", "source"), ("native", "back"), ("back", "native"), ("back", "source")]
    for name in ("native", "back"):
        assert verify(made / name) == 0
        assert f"{name}: sound; " in capsys.readouterr().out
    for name, against in pairs:
        assert verify(made / name, "--against", made / against) == 0
        assert f"against {made / against}" in capsys.readouterr().out


def test_weights_that_were_rounded_are_compared_as_such(made, tmp_path):
    options = ["--dtype", "bfloat16"]
    assert main(["to-hf", str(made / "native"), str(tmp_path / "x"), *options]) == 0
    assert verify(tmp_path / "x", "--against", made / "native") == 0


def copied(made, name, tmp_path):
    copy = tmp_path / name
    for path in (made / name).rglob("*"):
        if path.is_file():
            target = copy / path.relative_to(made / name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return copy


def weight_files(directory, name):
    if name == "native":
        paths = (directory / "params").rglob("*")
        return sorted(p for p in paths if p.name[0].isdigit())
    return sorted(directory.glob("*.safetensors"))


@pytest.mark.parametrize("name", ["native", "back"])
def test_flipped_bits_anywhere_are_found(made, tmp_path, capsys, name):
    copy = copied(made, name, tmp_path)
    rng = random.Random(3)
    files = weight_files(copy, name)
    for path in rng.sample(files, min(12, len(files))):
        whole = path.read_bytes()
        broken = bytearray(whole)
        broken[rng.randrange(len(whole) // 2, len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        assert verify(copy) == 2
        error = capsys.readouterr().err
        assert (path.parent.name if name == "native" else path.name) in error
        assert "SHA-256" in error and error.count("\n") == 1
        path.write_bytes(whole)
    assert verify(copy) == 0


@pytest.mark.parametrize("name", ["native", "back"])
def test_every_fault_is_named(made, tmp_path, capsys, name):
    copy = copied(made, name, tmp_path)
    files = weight_files(copy, name)
    chosen = files[:: max(1, len(files) // 3)][:3]
    for path in chosen:
        whole = bytearray(path.read_bytes())
        whole[-1] ^= 1
        path.write_bytes(whole)
    assert verify(copy) == 2
    error = capsys.readouterr().err
    for path in chosen:
        assert (path.parent.name if name == "native" else path.name) in error


def edited(weights, edit):
    changed = {name: weight.copy() for name, weight in weights.items()}
    names = sorted(name for name in weights if "mlp.experts" in name and "up_proj" in name)
    first, second = names[:2]
    if edit == "two experts are swapped":
        changed[first], changed[second] = changed[second], changed[first]
    elif edit == "one bit":
        changed[first].view(np.uint8).reshape(-1)[77] ^= 1
    elif edit == "a transposed matrix":
        square = next(n for n, w in weights.items() if w.ndim == 2 and w.shape[0] == w.shape[1])
        changed[square] = np.ascontiguousarray(changed[square].T)
    elif edit == "the layer below":
        norms = [name for name in weights if name.endswith("input_layernorm.weight")]
        changed[norms[1]] = changed[norms[0]]
    elif edit == "another sign":
        changed[first] = -changed[first]
    return changed


@pytest.mark.parametrize(
    "edit",
    [
        "two experts are swapped",
        "one bit",
        "a transposed matrix",
        "the layer below",
        "another sign",
    ],
)
def test_values_of_another_model_are_found(tmp_path, capsys, edit):
    raw = TINY | {"hidden_size": 64, "q_lora_rank": 64}
    weights = random_weights(raw)
    for name, weight in weights.items():  # norms start as ones, all the same
        if weight.ndim == 1:
            weight += np.random.default_rng(len(name)).normal(size=weight.shape).astype(np.float32)
            weight += int("".join(filter(str.isdigit, name)) or 0)
    write_published(tmp_path / "source", raw, weights)
    write_published(tmp_path / "other", raw, edited(weights, edit))
    assert main(["from-hf", str(tmp_path / "other"), str(tmp_path / "native")]) == 0
    assert verify(tmp_path / "native") == 0
    capsys.readouterr()
    assert verify(tmp_path / "native", "--against", tmp_path / "source") == 2
    assert "has other values than in" in capsys.readouterr().err


def test_scales_that_were_divided_by_are_found(made, tmp_path, capsys):
    weights = random_weights(WIDE)
    published, values = float8_weights(weights)
    wrong = {
        name: values[name] * 1.0001 if name + "_scale_inv" in published else weight
        for name, weight in values.items()
    }
    wrong = {name: w.astype(np.float32) for name, w in wrong.items()}
    write_published(tmp_path / "other", WIDE, wrong)
    assert main(["from-hf", str(tmp_path / "other"), str(tmp_path / "native")]) == 0
    assert verify(tmp_path / "native", "--against", made / "source") == 2
    assert "has other values" in capsys.readouterr().err


def test_a_sample_reads_a_part(made, capsys):
    def looked(*options):
        assert verify(made / "native", "--sample", *options) == 0
        return int(capsys.readouterr().out.split(" tensors, ")[1].split(" ")[0].replace(",", ""))

    assert 0 < looked("0.000001") < looked("0.2") < looked("0.9") < looked("1")
    assert looked("0.3", "--seed", "1") != looked("0.3", "--seed", "2")


def test_without_digests_there_is_nothing_to_compare_with(made, capsys):
    assert verify(made / "source") == 2
    assert "expected --against SRC" in capsys.readouterr().err
    assert verify(made / "source", "--against", made / "native") == 0


FORMAT = {"format": "glm5-jax conversion 1"}


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"written": []},
        FORMAT | {"written": {"a": 3}},
        FORMAT | {"written": {"a": {"size": "abc", "sha256": ""}}},
        *(
            FORMAT | {"written": {name: {"size": 1, "sha256": ""}}}
            for name in ("../a", "a\0b", "\ud800", "", "/dev/zero")
        ),
    ],
)
def test_a_damaged_record_is_named(made, tmp_path, capsys, record):
    copy = copied(made, "back", tmp_path)
    (copy / "conversion.json").write_text(json.dumps(record))
    assert verify(copy) == 2
    assert "conversion.json" in capsys.readouterr().err


def test_the_record_says_what_was_read_and_written(made):
    import hashlib

    record = json.loads((made / "native" / "conversion.json").read_text())
    assert record["command"] == "from-hf" and record["source"] == "source"
    files = sorted((made / "source").glob("*.safetensors"))
    assert list(record["read"]) == [path.name for path in files]
    for path in files:
        whole = hashlib.sha256(path.read_bytes()).hexdigest()
        assert record["read"][path.name] == {"size": path.stat().st_size, "sha256": whole}
        assert whole in (made / "native" / "CONVERSION.md").read_text()
    record = json.loads((made / "back" / "conversion.json").read_text())
    files = sorted((made / "back").glob("*.safetensors"))
    beside = ["config.json", "model.safetensors.index.json"]
    assert list(record["written"]) == [*(path.name for path in files), *beside]
    assert (made / "back" / "README.md").read_text() == "# A model"


def test_a_share_that_is_none_is_refused(made, capsys):
    for value in ("0", "1.5", "x"):
        with pytest.raises(SystemExit):
            verify(made / "native", "--sample", value)
        assert "expected above 0 and at most 1" in capsys.readouterr().err


def test_a_file_that_the_record_does_not_list_is_named(made, tmp_path, capsys):
    copy = copied(made, "back", tmp_path)
    record = json.loads((copy / "conversion.json").read_text())
    shard = next(iter(record["written"]))
    del record["written"][shard]
    (copy / "conversion.json").write_text(json.dumps(record))
    assert verify(copy) == 2
    assert f"{shard}: is not in conversion.json" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["native", "back"])
def test_another_config_is_named(made, tmp_path, capsys, name):
    copy = copied(made, name, tmp_path)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert verify(copy) == 2
    assert "config.json" in capsys.readouterr().err
    if name == "back":
        (copy / "conversion.json").unlink()
        assert verify(copy, "--against", made / "native") == 2
        assert "rms_norm_eps: differs, 0.5 and" in capsys.readouterr().err


@pytest.mark.parametrize("threads", ["1", "4"])
def test_a_damaged_origin_is_named(made, tmp_path, capsys, threads):
    copy = copied(made, "native", tmp_path)
    for path in weight_files(copy, "native")[::3]:
        path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    options = ["--threads", threads, "--memory", "1KB"]
    assert verify(made / "back", "--against", copy, *options) == 2
    error = capsys.readouterr().err
    assert f"{copy}/params: leaf " in error and error.count("\n") == 1


def test_a_manifest_of_chunks_that_cover_nothing_is_refused(made, tmp_path, capsys):
    copy = copied(made, "native", tmp_path)
    path = copy / "params" / "manifest.json"
    whole = json.loads(path.read_text())
    for chunk, digests in (([-3, 64], []), ([0, 64], []), ([True, 64], None), ([10**6, 64], ["x"])):
        manifest = json.loads(json.dumps(whole))
        entry = manifest["leaves"]["embedding"]
        entry["chunk"] = chunk
        entry["sha256"] = entry["sha256"] if digests is None else digests
        path.write_text(json.dumps(manifest))
        assert verify(copy) == 2
        assert "manifest.json: damaged" in capsys.readouterr().err
