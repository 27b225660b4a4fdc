"""What is told of a part of a checkpoint, read for it and refused of it."""

import json
import re

import numpy as np
import pytest

from convert.__main__ import main
from glm5_jax.published.tensor_file import TensorFile
from tests.tiny import (
    GROUPED,
    SHARED,
    TINY,
    WIDE,
    random_weights,
    write_published,
)

FAULTS = {
    "layers": (
        TINY,
        ["--layers", "0,8-10,12"],
        "has no layers 8-10,12, expected some of 0-6, and 7",
    ),
    "MTP alone": (TINY, ["--layers", "7"], "expected some of the layers 0-6"),
    "no MTP": (
        TINY | {"num_nextn_predict_layers": 0},
        ["--layers", "0,7"],
        "has no layers 7, expected some of 0-6",
    ),
    "shared": (SHARED, ["--layers", "0,1,3-6"], "layers 3-5 share the selection of layer 2"),
    "experts": (
        TINY,
        ["--experts", "9"],
        "has 8 experts, expected at most as many in --experts, not 9",
    ),
    "groups": (
        GROUPED,
        ["--experts", "3"],
        "has groups of 2 experts, expected whole ones in --experts, not 3",
    ),
    "all of it": (
        SHARED,
        ["--layers", "0,3,9", "--experts", "9"],
        "has no layers 9, expected some of 0-6, and 7 for multi-token prediction; layers 3 share "
        "the selection of layer 2, expected it in --layers, too; has 8 experts",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_subset_that_cannot_be_is_one_line(tmp_path, capsys, fault):
    raw, options, said = FAULTS[fault]
    source = write_published(tmp_path / "source", raw, {})
    assert main(["from-hf", str(source), str(tmp_path / "native"), *options]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("text", ["", "a", "3-1", "-1", "1,,2", "0-99999", "1.5"])
def test_what_is_no_list_of_layers_is_refused(tmp_path, capsys, text):
    with pytest.raises(SystemExit) as ended:
        main(["from-hf", str(tmp_path), str(tmp_path / "x"), f"--layers={text}"])
    assert ended.value.code == 2 and "expected layers such as 0-3,78" in capsys.readouterr().err


def test_fewer_experts_than_a_token_has_are_told_of(tmp_path, capsys):
    source = write_published(tmp_path / "source", TINY, random_weights(TINY))
    assert main(["from-hf", str(source), str(tmp_path / "native"), "--experts", "1"]) == 0
    assert "num_experts_per_tok becomes 1, not 2" in capsys.readouterr().err


def layer_of(name):
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else None


@pytest.fixture
def by_layers(tmp_path):
    """A checkpoint whose shards hold three layers each, as published ones do."""
    weights = random_weights(TINY)
    order = sorted(weights, key=lambda name: -1 if layer_of(name) is None else layer_of(name))
    source = write_published(tmp_path / "source", TINY, weights)
    (source / "model.safetensors").unlink()
    names = {number: [n for n in order if (layer_of(n) or 0) // 3 == number] for number in range(3)}
    weight_map = {}
    for number, held in names.items():
        shard = f"model-{number + 1:05d}-of-00003.safetensors"
        write_published(tmp_path / "one", TINY, {n: weights[n] for n in held})
        (tmp_path / "one" / "model.safetensors").rename(source / shard)
        weight_map |= dict.fromkeys(held, shard)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return source


def test_only_what_is_needed_is_read_and_need_be_there(tmp_path, capsys, by_layers, monkeypatch):
    options = ["--layers", "1,6-7", "--experts", "2"]
    (by_layers / "model-00002-of-00003.safetensors").unlink()
    arguments = ["from-hf", str(by_layers), str(tmp_path / "native"), *options]
    assert main([*arguments, "--plan"]) == 0
    planned = capsys.readouterr().out
    read = []

    def read_bytes(self, offset, count, original=TensorFile.read_bytes):
        if offset:  # beside headers
            read.append(count)
        return original(self, offset, count)

    with monkeypatch.context() as patched:
        patched.setattr(TensorFile, "read_bytes", read_bytes)
        assert main(arguments) == 0
    tensors, size = re.search(r": (\d+) tensors, ([\d,]+) bytes", capsys.readouterr().out).groups()
    assert f"{tensors} tensors in 2 shards" in planned
    assert f"\n{size} bytes to read\n{size} bytes to write" in planned
    assert sum(read) == int(size.replace(",", ""))
    assert main(["verify", str(tmp_path / "native"), "--against", str(by_layers), *options]) == 0
    assert main(["check", str(by_layers)]) == 2  # all of it is not there


def test_the_record_tells_of_the_subset_and_has_no_digests(tmp_path, by_layers):
    native = tmp_path / "native"
    options = ["--layers", "0,1,2,6", "--experts", "4"]
    assert main(["from-hf", str(by_layers), str(native), *options]) == 0
    record = json.loads((native / "conversion.json").read_text())
    assert record["options"] == {"layers": "0-2,6", "experts": 4}
    assert record["read"] == {
        name: {"size": (by_layers / name).stat().st_size, "sha256": None}
        for name in ("model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors")
    }
    card = (native / "CONVERSION.md").read_text()
    assert "- layers: 0-2,6\n- experts: 4\n" in card and card.count("| read in part |") == 2


def test_a_conversion_goes_on_with_the_same_subset_only(tmp_path, capsys, by_layers):
    arguments = ["from-hf", str(by_layers), str(tmp_path / "native")]
    options = ["--layers", "0-4"]
    assert main([*arguments, *options, "--process", "0/2"]) == 0
    assert not (tmp_path / "native").exists()
    for other in (["--layers", "0-3,5"], ["--layers", "0-4", "--experts", "8"], []):
        assert main([*arguments, *other]) == 2
        assert "a conversion was begun with" in capsys.readouterr().err
    assert main([*arguments, *options]) == 0
    assert "1 of 2 shards are done already" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "native"), "--against", str(by_layers), *options]) == 0


def test_another_subset_or_source_does_not_verify(tmp_path, capsys):
    weights = random_weights(TINY)
    source = write_published(tmp_path / "source", TINY, weights)
    native, options = tmp_path / "native", ["--layers", "0,4", "--experts", "4"]
    assert main(["from-hf", str(source), str(native), *options]) == 0
    verify = ["verify", str(native), "--against", str(source)]
    assert main([*verify, "--layers", "0,5", "--experts", "4"]) == 2
    assert "model.layers.1.input_layernorm.weight: has other values" in capsys.readouterr().err
    assert main([*verify, "--layers", "0,4"]) == 2
    assert "n_routed_experts: differs, 4 and 8" in capsys.readouterr().err
    router = "model.layers.4.mlp.gate.weight"
    weights[router] = weights[router].copy()
    for row, status in ((4, 0), (3, 2)):  # of an expert that was left out, and of one that was not
        weights[router][row, 7] += 1
        write_published(tmp_path / "source", TINY, weights)
        assert main([*verify, *options]) == status
    assert "model.layers.1.mlp.gate.weight: has other values" in capsys.readouterr().err
    assert main(["verify", str(native), *options]) == 2
    assert "expected --against" in capsys.readouterr().err
    assert main(["verify", str(native), "--against", str(native), *options]) == 2
    assert "is native, expected a published one" in capsys.readouterr().err


def test_an_unknown_or_misshapen_tensor_is_named_within_what_is_kept(tmp_path, capsys):
    weights = random_weights(WIDE)
    weights["model.layers.4.mlp.gate.weight"] = np.zeros((9, 192), np.float32)
    weights["model.layers.4.extra"] = weights["extra"] = np.zeros(3, np.float32)
    source = write_published(tmp_path / "source", WIDE, weights)
    arguments = ["from-hf", str(source), str(tmp_path / "native"), "--experts", "2", "--layers"]
    assert main([*arguments, "0,4"]) == 2
    error = capsys.readouterr().err
    assert "its layers 0,4 renumbered: extra is unknown; model.layers.1.extra is unknown" in error
    assert "model.layers.1.mlp.gate.weight has shape [9, 192], expected [2, 192]" in error
    del weights["extra"]
    write_published(tmp_path / "source", WIDE, weights)
    assert main([*arguments, "0,3"]) == 0
