"""Files of torch.save: read row by row, or refused by name; nothing in them runs."""

import hashlib
import json
import sys
import zipfile

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from convert import portions
from convert.__main__ import main
from glm5_jax import chunks
from glm5_jax.errors import InputError
from glm5_jax.published.torch_file import TorchFile
from tests.test_exports import assert_equal_models, fused
from tests.tiny import TINY, WIDE, float8_weights, random_weights, write_published

torch = pytest.importorskip("torch", reason="PyTorch, which writes these files, is not installed")


def torch_tensor(array):
    """With its dtype, of which torch reads some from bytes only."""
    raw = torch.from_numpy(np.ascontiguousarray(array).view(np.uint8).copy())
    return raw.view(getattr(torch, array.dtype.name)).reshape(array.shape)


def write_torch(directory, raw, weights, num_shards=1, name="pytorch_model.bin"):
    """A directory as transformers wrote before it had safetensors."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(raw))
    tensors = {key: w if torch.is_tensor(w) else torch_tensor(w) for key, w in weights.items()}
    if num_shards == 1:
        torch.save(tensors, directory / name)
        return directory
    weight_map = {}
    for number in range(num_shards):
        shard = f"pytorch_model-{number + 1:05d}-of-{num_shards:05d}.bin"
        held = {key: tensors[key] for key in list(tensors)[number::num_shards]}
        torch.save(held, directory / shard)
        weight_map |= dict.fromkeys(held, shard)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def assert_converts_like(tmp_path, source, plain):
    """The same weights, and every byte of the source's files digested."""
    native = tmp_path / "native"
    assert main(["check", str(source)]) == 0
    assert main(["from-hf", str(source), str(native)]) == 0
    assert main(["verify", str(native), "--against", str(plain)]) == 0
    assert main(["diff", str(source), str(plain)]) == 0
    assert_equal_models(source, plain)
    read = json.loads((native / "conversion.json").read_text())["read"]
    assert read and all(
        entry["sha256"] == hashlib.sha256((source / name).read_bytes()).hexdigest()
        for name, entry in read.items()
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_files_of_torch_convert_like_safetensors(tmp_path, dtype, num_shards):
    weights = {
        name: torch_tensor(w).to(getattr(torch, dtype)) for name, w in random_weights(TINY).items()
    }
    source = write_torch(tmp_path / "source", TINY, weights, num_shards)
    from safetensors.torch import save_file

    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_text(json.dumps(TINY))
    save_file(weights, plain / "model.safetensors")
    assert_converts_like(tmp_path, source, plain)


def test_float8_and_fused_experts_are_read_from_files_of_torch(tmp_path):
    raw = WIDE | {"moe_intermediate_size": 128}
    weights, values = float8_weights(random_weights(raw))
    source = write_torch(tmp_path / "source", raw, fused(weights), num_shards=2)
    assert_equal_models(source, write_published(tmp_path / "plain", raw, values))


@pytest.mark.parametrize("chunk_bytes", [1000, 2**25])
def test_tensors_that_share_bytes_are_read_and_digested_once(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(portions, "CHUNK_BYTES", chunk_bytes)
    weights = random_weights(TINY)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    plain = write_published(
        tmp_path / "plain", TINY, {name: w.copy() for name, w in weights.items()}
    )
    tensors = {name: torch_tensor(w) for name, w in weights.items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    parts = [f"model.layers.4.mlp.experts.2.{part}_proj.weight" for part in ("gate", "up")]
    rest = torch.full((7, 64), torch.nan)  # of a storage that no tensor shows
    whole = torch.cat([rest, *(tensors[name] for name in parts), rest])
    tensors |= {name: whole[7 + 32 * i : 39 + 32 * i] for i, name in enumerate(parts)}
    source = write_torch(tmp_path / "source", TINY, tensors)
    assert_converts_like(tmp_path, source, plain)


def test_what_accelerate_saves_is_read(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    hf = pytest.importorskip("tests.reference.hf", reason="transformers is not installed")
    model, source = hf.hf_model(TINY, random_weights(TINY)), tmp_path / "source"
    accelerate.Accelerator(cpu=True).save_model(
        model, source, max_shard_size="300KB", safe_serialization=False
    )
    assert len(list(source.glob("pytorch_model-*.bin"))) > 3
    (source / "config.json").write_text(json.dumps(TINY))
    kept = {n: w for n, w in random_weights(TINY).items() if ".layers.7." not in n}
    assert_converts_like(tmp_path, source, write_published(tmp_path / "plain", TINY, kept))


@pytest.mark.parametrize("nested", ["state_dict", "model"])
@pytest.mark.parametrize("name", ["epoch-3.pt", "consolidated.pth", "weights.bin"])
def test_a_file_of_any_name_may_hold_tensors_beside_an_optimizer(tmp_path, capsys, nested, name):
    weights = random_weights(TINY)
    plain = write_published(tmp_path / "plain", TINY, weights)
    source = write_torch(tmp_path / "source", TINY, {}, name=name)
    tensors = {f"module.{key}": torch.nn.Parameter(torch_tensor(w)) for key, w in weights.items()}
    optimizer = {"state": {0: torch.zeros(3)}, "lr": 0.1}
    torch.save({"epoch": 3, nested: tensors, "optimizer": optimizer}, source / name)
    assert_converts_like(tmp_path, source, plain)
    assert f"{name}: the tensors under {nested!r} are read" in capsys.readouterr().err


def test_safetensors_are_preferred(tmp_path):
    source = write_published(tmp_path / "source", TINY, random_weights(TINY))
    (source / "pytorch_model.bin").write_bytes(b"of no use")
    assert main(["check", str(source)]) == 0


def test_of_several_files_one_must_be_meant(tmp_path, capsys):
    source = write_torch(tmp_path / "source", TINY, {}, name="a.pt")
    (source / "b.pth").touch()
    assert main(["check", str(source)]) == 2
    assert "of a.pt, b.pth it is not clear which is meant" in capsys.readouterr().err


def test_a_missing_package_is_named(tmp_path, capsys, monkeypatch):
    source = write_torch(tmp_path / "source", TINY, random_weights(TINY))
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["from-hf", str(source), str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert "needs the package torch: pip install 'glm5-jax[torch]'" in error
    assert error.count("\n") == 1 and not (tmp_path / "x").exists()


class _Code:
    def __reduce__(self):
        return print, ("it ran",)


def refused(path):
    with pytest.raises(InputError) as caught:
        TorchFile(path)
    said = str(caught.value)
    assert said.startswith(str(path)) and "\n" not in said and "\x1b" not in said
    return said


def test_every_entry_that_is_no_plain_tensor_is_named(tmp_path):
    path = tmp_path / "x.bin"
    square = torch.zeros(4, 4)
    torch.save(
        {
            "turned": square.T,
            "half": square[:, :2],
            "ints": torch.arange(3),
            "sparse": square.to_sparse(),
            "step": 7,
            "name": "a",
            5: square,
            "sound": square,
        },
        path,
    )
    said = refused(path)
    assert "turned has strides [1, 4] of shape [4, 4], expected contiguous rows" in said
    assert "half has strides [4, 1] of shape [4, 2]" in said
    assert "ints has dtype int64, expected one of float32" in said
    assert "sparse is sparse, quantized or stored negated" in said
    assert "step is of type int, expected a tensor" in said and "name is of type str" in said
    assert "5 is a key of type int" in said and "sound" not in said


def test_nothing_that_a_file_wants_to_run_is_run(tmp_path, capsys):
    path = tmp_path / "x.bin"
    torch.save({"a": _Code(), "b": torch.nn.Linear(2, 2)}, path)
    said = refused(path)
    for name in ("torch.nn.modules.linear.Linear", "builtins.print"):
        assert f"{name} is asked for, expected tensors alone" in said
    assert capsys.readouterr().out == ""


def test_other_files_are_told_from_those_of_torch_save(tmp_path):
    path = tmp_path / "x.bin"
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    assert "is not a zip archive, expected one as torch.save makes since torch 1.6" in refused(path)
    path.write_bytes(b"")
    assert "is not a zip archive" in refused(path)
    torch.save([torch.zeros(2)], path)
    assert "is a list, expected named tensors" in refused(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/y", b"z")
    assert "cannot be read as tensors" in refused(path)


def rewritten(path, edit, compression=zipfile.ZIP_STORED):
    """The same archive, whose members may have other contents."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in edit(members).items():
            archive.writestr(name, data)


def test_members_that_are_compressed_moved_cut_or_turned_around_are_named(tmp_path):
    path = tmp_path / "x.bin"
    tensors = {f"t{i}": torch.arange(40.0) + i for i in range(2)}

    def repack(changes, compression=zipfile.ZIP_STORED):
        torch.save(tensors, path)
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()} | changes
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, data in members.items():
                archive.writestr(name, data)

    older = {"x/.format_version": b"0"}  # torch then looks up where members are
    repack(older)
    with TorchFile(path) as file:
        np.testing.assert_array_equal(file.read("t1", 0, 40), np.arange(40) + 1)
    repack({})
    assert "t1 has bytes that are not where torch.save puts them" in refused(path)
    repack({}, zipfile.ZIP_DEFLATED)
    assert "x/data/0 is compressed" in refused(path) and "x/data/1 is compressed" in refused(path)
    repack(older | {"x/data/1": b"short"})
    assert "t1 has bytes that are not where torch.save puts them" in refused(path)
    repack({"x/byteorder": b"big"})
    assert "byteorder is b'big', expected b'little'" in refused(path)


SOUND = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.arange(7, dtype=np.float16)}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "x.bin"
    torch.save({name: torch_tensor(w) for name, w in SOUND.items()}, path)
    return path.read_bytes()


def open_or_refuse(path):
    """Whatever is opened can be read; whatever cannot is one line."""
    try:
        file = TorchFile(path)
    except InputError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
        return
    with file:
        for name, info in file.tensors.items():
            if info.num_bytes:
                rows = info.shape[0] if info.shape else 1
                assert file.read(name, 0, rows).nbytes == info.num_bytes


@hypothesis.given(st.integers(0, 5000))
@hypothesis.settings(max_examples=200)
def test_a_truncated_file_is_refused(tmp_path_factory, sound, length):
    path = tmp_path_factory.getbasetemp() / "cut.bin"
    path.write_bytes(sound[: min(length, len(sound) - 1)])
    refused(path)


@hypothesis.given(
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 7)), min_size=1, max_size=4)
)
@hypothesis.settings(max_examples=1000)
@pytest.mark.filterwarnings("ignore")
def test_flipped_bits_make_no_file_that_opens_and_cannot_be_read(tmp_path_factory, sound, flips):
    path = tmp_path_factory.getbasetemp() / "flipped.bin"
    damaged = bytearray(sound)
    for place, bit in flips:
        damaged[place % len(sound)] ^= 1 << bit
    path.write_bytes(damaged)
    open_or_refuse(path)
