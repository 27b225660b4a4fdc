"""A run that ends before its last step, however it does, goes on as if it had not."""

import fcntl
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time

import numpy as np
import pytest

from glm5_jax.checkpoint import restore_checkpoint
from glm5_jax.errors import InputError
from glm5_jax.params import leaves_by_path
from glm5_jax.tree_store import TreeReader
from tests.killed import train_in_a_process
from tests.test_train_command import RAW as LARGER
from tests.text import prepare_data
from train import loop
from train.__main__ import main
from train.metrics import read_metrics

STAGES = """
config = "config.json"
optimizer = "muon_split"
batch_size = 4
first_batch_size = 2
batch_warmup_steps = 2
length = 24
eval_rows = 4
eval_every = 3
warmup_steps = 2
learning_rate = 0.01
average_decay = 0.9
save_every = 2
[[stages]]
stage = "dense"
steps = 5
[[stages]]
stage = "warmup"
steps = 3
[[stages]]
stage = "sparse"
steps = 4
"""

RAW = LARGER | {"num_hidden_layers": 2, "indexer_types": ["full", "shared"]}
RAW |= {"mlp_layer_types": ["dense", "sparse"]}

pytestmark = pytest.mark.standard_promotion


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    prepare_data(folder)
    (folder / "config.json").write_text(json.dumps(RAW))
    (folder / "stages.toml").write_text(STAGES)
    return folder


def command(workplace, run, *options):
    file = str(workplace / "stages.toml")
    return ["run", str(workplace / "data"), str(run), "--file", file, *map(str, options)]


@pytest.fixture(scope="module")
def whole(workplace):
    """The run without an interruption."""
    run = workplace / "whole"
    assert main(command(workplace, run)) == 0
    return run


def assert_same_end(run, whole, step=12):
    """Bit for bit in weights and all else that is saved, and in every number but the speeds."""
    last = whole / f"step-{step:06d}"
    chunks = [path for path in last.rglob("*") if re.fullmatch(r"[\d.]+", path.name)]
    assert {path.relative_to(last).parts[0] for path in chunks} == {"params", "training", "average"}
    for path in chunks:
        assert path.read_bytes() == (run / path.relative_to(whole)).read_bytes(), path
    assert comparable(run) == comparable(whole)


def comparable(run):
    records = read_metrics(run / "metrics.jsonl")
    return [
        {name: value for name, value in record.items() if not name.startswith("tokens_per_second")}
        for record in records
    ]


def test_stages_hand_over_by_themselves(whole):
    records = read_metrics(whole / "metrics.jsonl")
    assert [record["stage"] for record in records] == ["dense"] * 5 + ["warmup"] * 3 + [
        "sparse"
    ] * 4
    assert [record["step"] for record in records if "bits_per_byte" in record] == [
        3,
        5,
        6,
        8,
        9,
        12,
    ]
    # Each with its own schedule, that starts again.
    assert [record["step"] for record in records if record["learning_rate"] == 0] == [1, 6, 9]
    names = sorted(path.name for path in whole.glob("step-*"))
    assert names == [
        f"step-{step:06d}" for step in (5, 8, 10, 12)
    ]  # ends of stages, and the newest
    dense, warmed, sparse = (
        leaves_by_path(restore_checkpoint(whole / f"step-{step:06d}")) for step in (5, 8, 12)
    )
    for path, weight in dense.items():
        moved = [not np.array_equal(weight, other[path]) for other in (warmed, sparse)]
        assert moved == [".indexer." in path, True], path


def test_the_average_is_a_model_too(whole):
    weights, averages = (
        leaves_by_path(restore_checkpoint(whole / "step-000012" / part)) for part in ("", "average")
    )
    assert weights.keys() == averages.keys()
    assert any(not np.array_equal(weight, averages[path]) for path, weight in weights.items())


@pytest.mark.parametrize("left", [5, 10])
def test_a_run_goes_on_from_any_checkpoint_as_if_never_stopped(workplace, whole, left, monkeypatch):
    """Within a stage and between two."""
    run = workplace / f"left-{left}"
    stop_at(monkeypatch, left)
    assert main(command(workplace, run)) == 0
    monkeypatch.undo()
    assert main(command(workplace, run)) == 0
    assert_same_end(run, whole)


def stop_at(monkeypatch, step, number=signal.SIGTERM):
    """Sends a signal to this process when a step is recorded."""
    make_record = loop.make_record

    def record(at, *arguments):
        if at == step:
            signal.raise_signal(number)
        return make_record(at, *arguments)

    monkeypatch.setattr(loop, "make_record", record)


def test_a_trace_of_steps_ends_with_its_stage(workplace, tmp_path):
    run = tmp_path / "run"
    assert main(command(workplace, run, "--profile", "4-7")) == 0
    assert len(list((run / "profile").rglob("*.xplane.pb"))) == 1


@pytest.mark.parametrize("steps", ["13-14", "4-13"])
def test_a_trace_of_steps_that_do_not_come_is_refused(workplace, tmp_path, capsys, steps):
    assert main(command(workplace, tmp_path / "run", "--profile", steps)) == 2
    assert f"profile is {steps}, expected steps up to 12" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_after_its_step(
    workplace, tmp_path, monkeypatch, capsys, number, status
):
    stop_at(monkeypatch, 3, number)
    assert main(command(workplace, tmp_path / "run")) == status
    printed = capsys.readouterr().out
    assert f"step-000003: stopped by {number.name} after 3 of 12 steps; the same" in printed
    saved = sorted(path.name for path in (tmp_path / "run").glob("step-*"))
    assert saved == ["step-000002", "step-000003"]
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 3


def copy(whole, to, *steps):
    """A run that was left after the last of the steps."""
    shutil.copytree(whole, to)
    for path in to.glob("step-*"):
        if int(path.name[5:]) not in steps:
            shutil.rmtree(path)
    return to


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("part", ["params", "training", "average/params"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    workplace, whole, tmp_path, capsys, part
):
    run = copy(whole, tmp_path / "run", 8, 10)
    leaf = max((run / "step-000010" / part).rglob("[0-9]*"), key=lambda path: path.stat().st_size)
    flip(leaf)
    assert main(command(workplace, run)) == 0
    error = capsys.readouterr().err
    assert "step-000010" in error and "damaged" in error and "the one before it is used" in error
    assert f"{run}: goes on from step-000008" in error
    assert (run / "damaged-step-000010").exists()
    assert_same_end(run, whole)


def test_a_damaged_config_is_no_other_model(workplace, whole, tmp_path, capsys):
    run = copy(whole, tmp_path / "run", 8, 10)
    config = run / "step-000010" / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": ', '"hidden_size": 1'))
    assert main(command(workplace, run)) == 0
    assert f"{config}: not as it was written" in capsys.readouterr().err
    assert_same_end(run, whole)


def test_a_run_of_which_every_checkpoint_is_damaged_is_left_alone(
    workplace, whole, tmp_path, capsys
):
    run = copy(whole, tmp_path / "run", 8, 10)
    for name in ("step-000008", "step-000010"):
        (run / name / "params" / "manifest.json").unlink()
    assert main(command(workplace, run)) == 2
    error = capsys.readouterr().err
    assert "step-000010/params/manifest.json" in error.splitlines()[-1]
    assert not list(run.glob("damaged-*"))


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


def test_errors_of_saving_in_the_background_end_the_run(
    workplace, whole, tmp_path, monkeypatch, capsys
):
    """The error is that of the disk, and what was saved before stays."""
    run = copy(whole, tmp_path / "run", 8)

    def full(*arguments):
        raise OSError(28, "No space left on device", str(run / "step-000010"))

    monkeypatch.setattr("train.checkpoint.write_model", full)
    assert main(command(workplace, run)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"glm5-train: error: {run / 'step-000010'}: No space left on device"
    assert [path.name for path in run.glob("*step-*")] == ["step-000008"]
    monkeypatch.undo()
    assert main(command(workplace, run)) == 0
    assert_same_end(run, whole)


LONG = STAGES.replace("steps = 5", "steps = 60").replace("steps = 3", "steps = 20")
LONG = LONG.replace("steps = 4", "steps = 60").replace("eval_every = 3", "eval_every = 50")


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times_ends_as_if_it_had_not_been(workplace, tmp_path):
    """During steps, evaluations and saves, and before the first of them."""
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    (tmp_path / "stages.toml").write_text(LONG)
    (tmp_path / "data").symlink_to(workplace / "data")
    # Processes are forked from one that has imported everything and used no device.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train.run", "tests.killed"])

    def started(run):
        arguments = command(tmp_path, tmp_path / run)
        process = context.Process(target=train_in_a_process, args=(arguments, tmp_path / "cache"))
        process.start()
        return process

    whole = started("whole")
    whole.join(200)
    assert whole.exitcode == 0
    chance, metrics = random.Random(0), tmp_path / "killed" / "metrics.jsonl"
    for _ in range(20):
        size = metrics.stat().st_size if metrics.exists() else 0
        process = started("killed")
        while process.is_alive() and (not metrics.exists() or metrics.stat().st_size == size):
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.5))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    last = started("killed")
    last.join(200)
    assert last.exitcode == 0
    assert_same_end(tmp_path / "killed", tmp_path / "whole", step=140)
    assert not list((tmp_path / "killed").glob(".*partial*"))
