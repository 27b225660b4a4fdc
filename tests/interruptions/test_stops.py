"""A run that ends before its last step, however it does, goes on as if it had not."""

import signal

import numpy as np
import pytest

from glm5_jax.checkpoint import restore_checkpoint
from glm5_jax.params import leaves_by_path
from tests.interruptions.runs import assert_same_end, command, copy, stop_at
from train.__main__ import main
from train.metrics import read_metrics

pytestmark = pytest.mark.standard_promotion


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
