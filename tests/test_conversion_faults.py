"""Every way to damage a published checkpoint, through the command."""

import json
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest

from convert.__main__ import main
from glm5_jax.published.files import INDEX_NAME
from tests.damage import (
    contents,
    cut,
    data_start,
    flip_bit,
    make_checkpoints,
    one_line,
    random_shard,
    refused,
)
from tests.published_damage import (
    CASES,
    EMBEDDING,
    FIRST,
    NORM,
    SECOND,
    THIRD,
    header,
    linked_out,
    tensors,
)

SEEDS = 24


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_checkpoints(tmp_path_factory.mktemp("made"))


@pytest.fixture
def source(made, tmp_path, monkeypatch):
    """A copy to damage, in a place of its own, with a secret beside it."""
    shutil.copytree(made / "source", tmp_path / "in" / "source")
    (tmp_path / "in" / "secret.safetensors").write_text("not to be read")
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "in" / "source"


@pytest.mark.parametrize("case", CASES)
def test_a_damaged_source_is_one_line_and_nothing_is_written(source, tmp_path, capsys, case):
    damage, *said = CASES[case]
    damage(source)
    refused(capsys, tmp_path, ["from-hf", source, tmp_path / "out" / "x"], *said)


def test_all_that_is_wrong_stands_on_the_one_line(source, tmp_path, capsys):
    for case in ("a dtype that is none", "an empty file"):
        CASES[case][0](source)
    header(lambda found: found.popitem(), THIRD)(source)
    refused(
        capsys,
        tmp_path,
        ["from-hf", source, tmp_path / "out" / "x"],
        *(f"{name}: not a valid safetensors file" for name in (FIRST, SECOND, THIRD)),
    )


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_source_that_was_cut_off_is_refused(source, tmp_path, capsys, seed):
    rng = random.Random(seed)
    path = random_shard(source, rng)
    if seed % 4 == 0:
        os.truncate(path, rng.randrange(data_start(path)))
    elif seed % 4 == 1:
        path = source / rng.choice([INDEX_NAME, "config.json"])
        cut(path, rng)
    else:
        cut(path, rng)
    refused(capsys, tmp_path, ["from-hf", source, tmp_path / "out" / "x"], path.name)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_flipped_bit_of_what_is_said_of_weights_changes_none(
    made, source, tmp_path, capsys, seed
):
    """It is refused, or was in what bears on nothing, or verifying finds it."""
    rng = random.Random(seed)
    path = rng.choice([random_shard(source, rng), source / INDEX_NAME, source / "config.json"])
    stop = data_start(path) if path.suffix == ".safetensors" else None
    flip_bit(path, rng, 0, stop)
    out = tmp_path / "out" / "x"
    if main(["from-hf", str(source), str(out)]):
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("glm5-convert: error: ") and str(source) in error
        assert not list(out.parent.iterdir())
    elif main(["verify", str(out), "--against", str(made / "source")]):
        assert "config.json, " in capsys.readouterr().err
    else:
        assert contents(out / "params").keys() == contents(made / "native" / "params").keys()


def test_flipped_bits_of_weights_are_found_by_comparing_with_the_origin(
    made, source, tmp_path, capsys
):
    rng = random.Random(1)
    names = set()
    for _ in range(SEEDS):
        path = random_shard(source, rng)
        at = flip_bit(path, rng, data_start(path))
        whole = path.read_bytes()
        for name, said in json.loads(whole[8 : data_start(path)]).items():
            start, stop = said.get("data_offsets", (0, 0))
            if start <= at - data_start(path) < stop and not name.endswith("_scale_inv"):
                names.add(name)
    assert len(names) > 5
    out = tmp_path / "out" / "x"
    assert main(["from-hf", str(source), str(out)]) == 0
    assert main(["verify", str(out)]) == 0  # it is what it was made of
    one_line(capsys, ["verify", out, "--against", made / "source"], *names)
    read = [
        json.loads((each / "conversion.json").read_text())["read"]
        for each in (out, made / "native")
    ]
    assert all(read[0][name]["sha256"] != read[1][name]["sha256"] for name in read[0])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_told_of_and_refused_if_asked(
    source, tmp_path, capsys, value
):
    def spoil(tensor):
        changed = tensor.astype(np.float32)
        changed.flat[3] = value
        return changed

    tensors(**{NORM: spoil, EMBEDDING: spoil})(source)
    arguments = ["from-hf", source, tmp_path / "out" / "x"]
    said = [f"{name} has weights that are NaN or infinite (1)" for name in (NORM, EMBEDDING)]
    one_line(capsys, [*arguments, "--strict"], *said, "refused by --strict")
    assert not (tmp_path / "out" / "x").exists()
    assert main(list(map(str, arguments))) == 0
    error = capsys.readouterr().err
    assert all(phrase in error for phrase in said)


def test_a_process_of_its_own_ends_with_status_2_and_no_traceback(source, tmp_path):
    linked_out(source)
    done = subprocess.run(
        [sys.executable, "-m", "convert", "from-hf", str(source), str(tmp_path / "out" / "x")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"glm5-convert: error: {source / FIRST}: leads out of")
    assert done.stderr.count("\n") == 1
