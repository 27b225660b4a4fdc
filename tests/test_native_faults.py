"""Every way to damage a native checkpoint, through the commands that read it."""

import json
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest

from convert.__main__ import main
from glm5_jax.errors import InputError
from glm5_jax.tree_store import TreeReader
from tests.damage import (
    SHARDS,
    SMALL,
    contents,
    cut,
    flip_bit,
    make_checkpoints,
    one_line,
    refused,
    weights,
)
from tests.native_damage import CASES, CHUNK, MANIFEST, METADATA, ZARRAY, config, relaid
from tests.tiny import write_published

SEEDS = 24


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_checkpoints(tmp_path_factory.mktemp("made"))


@pytest.fixture
def native(made, tmp_path, monkeypatch):
    """A copy to damage, in a place of its own, with a secret beside it."""
    shutil.copytree(made / "native", tmp_path / "in" / "native")
    (tmp_path / "in" / "secret").write_text("not to be read")
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "in" / "native"


@pytest.mark.parametrize("case", CASES)
def test_a_damaged_source_is_one_line_and_nothing_is_written(native, tmp_path, capsys, case):
    damage, *said = CASES[case]
    damage(native)
    arguments = ["to-hf", native, tmp_path / "out" / "x"]
    refused(capsys, tmp_path, arguments, *said)
    if "params" in said[0]:
        return
    one_line(capsys, ["verify", native], *said)


def chunk_files(native):
    return sorted(path for path in (native / "params").glob("*/*") if path.name[0] != ".")


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_flipped_bit_anywhere_is_found(native, tmp_path, capsys, seed):
    rng = random.Random(seed)
    beside = [native / name for name in (MANIFEST, METADATA, "config.json")]
    path = rng.choice([rng.choice(chunk_files(native)), rng.choice(beside)])
    flip_bit(path, rng)
    refused(capsys, tmp_path, ["to-hf", native, tmp_path / "out" / "x"], str(native))
    said = one_line(capsys, ["verify", native])
    assert path.parent.name in said or path.name in said or "leaf " in said


def test_no_bit_of_the_metadata_of_a_leaf_can_be_flipped(native):
    """Chunks are read without them; Orbax reads chunks by them, so that they are to be right."""
    path = native / ZARRAY
    whole = path.read_bytes()
    for at in range(8 * len(whole)):
        broken = bytearray(whole)
        broken[at // 8] ^= 1 << at % 8
        path.write_bytes(broken)
        with pytest.raises(InputError, match=r"head/\.zarray: "):
            TreeReader(native / "params").read("head", (0, 0))


@pytest.mark.parametrize("seed", range(SEEDS))
def test_what_was_cut_off_is_found(native, tmp_path, capsys, seed):
    rng = random.Random(seed)
    names = (MANIFEST, METADATA, ZARRAY, "config.json")
    path = rng.choice([rng.choice(chunk_files(native)), native / rng.choice(names)])
    cut(path, rng)
    refused(capsys, tmp_path, ["to-hf", native, tmp_path / "out" / "x"], str(native))
    one_line(capsys, ["verify", native])


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_flipped_bit_of_what_was_made_of_it_is_found(made, tmp_path, capsys, seed):
    rng = random.Random(seed)
    shutil.copytree(made / "back", tmp_path / "back")
    record = json.loads((tmp_path / "back" / "conversion.json").read_text())
    path = tmp_path / "back" / rng.choice(list(record["written"]))
    flip_bit(path, rng)
    one_line(capsys, ["verify", tmp_path / "back"], str(tmp_path / "back"))


def test_no_memory_is_taken_for_a_chunk_that_is_not_there(native, capsys):
    config(vocab_size=2**24)(native)
    for name in ("embedding", "head"):
        relaid(name, [2**24, 64], "float32", [2**24, 64], [""])(native)
    said = "chunk 0.0: damaged, has 24,832 bytes, expected 4,294,967,296"
    one_line(capsys, ["verify", native], f"leaf embedding, {said}", f"leaf head, {said}")


@pytest.mark.parametrize("becomes", ["NaN", "infinite where it is rounded"])
def test_weights_that_are_not_finite_are_told_of_and_refused_if_asked(tmp_path, capsys, becomes):
    spoilt = dict(weights())
    for name in ("model.norm.weight", "lm_head.weight"):
        spoilt[name] = spoilt[name].copy()
        spoilt[name].flat[5] = np.nan if becomes == "NaN" else 3.4e38
    source = write_published(tmp_path / "source", SMALL, spoilt, num_shards=3)
    assert main(["from-hf", str(source), str(tmp_path / "native")]) == 0
    arguments = ["to-hf", tmp_path / "native", tmp_path / "x", "--dtype", "bfloat16"]
    said = [
        f"{name} has weights that are NaN or infinite (1)"
        for name in ("model.norm.weight", "lm_head.weight")
    ]
    one_line(capsys, [*arguments, "--strict"], *said, "refused by --strict")
    assert not (tmp_path / "x").exists()
    assert main(list(map(str, arguments))) == 0
    error = capsys.readouterr().err
    assert all(phrase in error for phrase in said)


def test_a_repaired_source_is_converted_with_what_was_done(made, native, tmp_path, capsys):
    path = native / "params" / "mtp.norm" / "0"  # of the last shard
    whole = path.read_bytes()
    flip_bit(path, random.Random(0))
    arguments = ["to-hf", native, tmp_path / "out" / "x", *SHARDS, "--threads", "1"]
    one_line(capsys, arguments, "leaf mtp.norm, chunk 0: damaged", "what is done is kept")
    path.write_bytes(whole)
    assert main(list(map(str, arguments))) == 0
    assert "are done already" in capsys.readouterr().err
    assert contents(tmp_path / "out" / "x") == contents(made / "back")


def test_a_process_of_its_own_ends_with_status_2_and_no_traceback(native, tmp_path):
    os.truncate(native / CHUNK, 100)
    done = subprocess.run(
        [sys.executable, "-m", "convert", "to-hf", str(native), str(tmp_path / "out" / "x")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"glm5-convert: error: {native}/params: leaf head, chunk 0.0")
    assert done.stderr.count("\n") == 1
