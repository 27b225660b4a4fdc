"""A run goes on with what it was started with, unless it is told otherwise."""

import fcntl
import json
import os

import pytest

from glm5_jax.errors import InputError
from glm5_jax.tree_store import TreeReader
from tests.interruptions.runs import RAW, assert_same_end, command, comparable, copy
from train import loop
from train.__main__ import main

pytestmark = pytest.mark.standard_promotion


def test_a_run_of_other_stages_is_refused_unless_told(workplace, whole, tmp_path, capsys):
    run = copy(whole, tmp_path / "run", 10)
    changed = command(workplace, run, "--weight-decay", "0.5")
    assert main(changed) == 2
    error = capsys.readouterr().err
    assert "stage 1 weight_decay 0.1, not 0.5; stage 2" in error and "--accept-changes" in error
    assert main([*changed, "--accept-changes"]) == 0
    assert "goes on otherwise than it was started, with stage 1" in capsys.readouterr().err
    assert comparable(run)[:10] == comparable(whole)[:10]
    assert comparable(run)[11] != comparable(whole)[11]
    assert main(changed) == 0, "it has been written down"


def test_a_changed_run_that_ends_before_it_is_saved_goes_on_as_changed(
    workplace, whole, tmp_path, monkeypatch
):
    """It forgets what losses were usual before the change, whenever it begins."""
    changed = ["--weight-decay", "0.5"]
    unbroken, run = (copy(whole, tmp_path / name, 10) for name in ("unbroken", "run"))
    assert main(command(workplace, unbroken, *changed, "--accept-changes")) == 0

    def fail(*_):
        raise InputError("killed")

    monkeypatch.setattr(loop, "make_record", fail)
    assert main(command(workplace, run, *changed, "--accept-changes")) == 2
    monkeypatch.undo()
    assert main(command(workplace, run, *changed)) == 0
    assert_same_end(run, unbroken)
    remembered = [
        int(TreeReader(each / "step-000012" / "training").read("watch.remembered", ()))
        for each in (whole, run)
    ]
    assert remembered == [4, 2]  # steps of the stage, and those since the change


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--optimizer", "adamw"], "/training: optimizer."),
        (["--average-decay", "0"], None),
        (["--steps", "3"], "step-000010: is beyond the 9 steps of the run"),
        (["--steps", "5"], "is of {'stage': 3, 'first_step': 8}, expected {'stage': 2"),
    ],
)
def test_changes_that_a_checkpoint_does_not_fit_are_no_damage(
    workplace, whole, tmp_path, capsys, options, named
):
    """Nothing is put aside, and the run goes on as it was started."""
    run = copy(whole, tmp_path / "run", 5, 10)
    before = (run / "run.json").read_bytes()
    changed = command(workplace, run, *options, "--accept-changes")
    if named is None:
        assert main(changed) == 0
        return
    assert main(changed) == 2
    assert named in capsys.readouterr().err.splitlines()[-1]
    assert sorted(path.name for path in run.glob("*step-*")) == ["step-000005", "step-000010"]
    assert (run / "run.json").read_bytes() == before and comparable(run) == comparable(whole)


def test_a_config_may_change_where_the_weights_still_fit(workplace, whole, tmp_path, capsys):
    run = copy(whole, tmp_path / "run", 10)
    (tmp_path / "longer.json").write_text(json.dumps(RAW | {"max_position_embeddings": 512}))
    changed = command(workplace, run, "--config", tmp_path / "longer.json")
    assert main(changed) == 2
    assert "max_position_embeddings 256, not 512" in capsys.readouterr().err
    assert main([*changed, "--accept-changes"]) == 0
    (tmp_path / "wider.json").write_text(json.dumps(RAW | {"moe_intermediate_size": 48}))
    changed = command(workplace, run, "--config", tmp_path / "wider.json", "--accept-changes")
    assert main(changed) == 2
    assert "has the shape" in capsys.readouterr().err.splitlines()[-1]


def test_other_data_are_refused(workplace, whole, tmp_path, capsys):
    run = copy(whole, tmp_path / "run", 10)
    other = tmp_path / "data"
    text = tmp_path / "text"
    text.mkdir()
    for number in range(9):
        (text / f"{number}.py").write_text(f"x = {number}\n" * 400)
    assert main(["prepare", str(other), "--text", str(text), "--vocab-size", "300"]) == 0
    arguments = command(workplace, run)
    arguments[1] = str(other)
    assert main(arguments) == 2
    assert "was started with digest" in capsys.readouterr().err


def test_two_processes_do_not_train_one_run(workplace, whole, tmp_path, capsys):
    run = copy(whole, tmp_path / "run", 10)
    folder = os.open(run, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        assert main(command(workplace, run)) == 2
    finally:
        os.close(folder)
    assert "another process is training this run" in capsys.readouterr().err
    assert sorted(path.name for path in run.glob("step-*")) == ["step-000010"]
