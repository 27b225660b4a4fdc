import dataclasses
import json

import pytest

from benchmarks import cpu_small, dsa_quality, mtp, muon, runs
from benchmarks.runs import Run
from tests.flags import xla_flags
from tests.tiny import TINY

CONFIG = TINY | {
    "vocab_size": 2048,
    "max_position_embeddings": 1024,
    "num_hidden_layers": 1,
    "mlp_layer_types": ["sparse"],
    "indexer_types": ["full"],
}
STAGES = "".join(f'[[stages]]\nstage = "{name}"\n' for name in ("dense", "warmup", "sparse"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def config(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


@pytest.fixture
def run_file(folder, config):
    path = folder / "small.toml"
    common = "steps = 2\nlength = 64\nbatch_size = 2\neval_rows = 2\nwarmup_steps = 0\n"
    path.write_text(f"config = {json.dumps(str(config))}\n{common}{STAGES}")
    return path


@pytest.fixture
def call(folder, config, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", xla_flags(1))  # of the commands
    small = {"config": config, "length": 64, "eval_rows": 2, "warmup_steps": 0}
    for module in (mtp, muon):
        monkeypatch.setattr(module, "SETTINGS", runs.SETTINGS | small)

    def call(benchmark, *options):
        name = benchmark.__name__.rpartition(".")[2]
        results = folder / "results"
        common = ["--folder", folder / "work", "--max-bytes", 1_500_000, "--results", results]
        status = benchmark.main([str(option) for option in (*common, *options)])
        assert (results / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (results / f"{name}.md").read_text().count("|") > 10
        return status, json.loads((results / f"{name}.json").read_text())["rows"]

    return call


@pytest.mark.slow
def test_a_small_run_is_made_twice_alike_and_branches(call, run_file, monkeypatch):
    status, rows = call(cpu_small, "--file", run_file)
    assert status == 0
    assert [row["steps"] for row in rows] == [6, 6] and all(row["minutes"] > 0 for row in rows)

    monkeypatch.setattr(dsa_quality, "_GOAL", -1.0)
    status, rows = call(dsa_quality, "--file", run_file)
    assert status == 1
    assert [row["step"] for row in rows] == [2, 4, 6, 6]
    assert [row["tokens"] for row in rows] == [256, 256, 512, 512]
    losses = [row["held_out_loss"] for row in rows]
    assert losses[0] == losses[1] and losses[2] != losses[3]


@pytest.mark.slow
def test_models_that_learn_further_ahead_draft(call, monkeypatch):
    monkeypatch.setattr(mtp, "_DEPTHS", (0, 2))
    monkeypatch.setattr(mtp, "_DRAFTS", (0, 2))
    monkeypatch.setattr(mtp, "_PROMPTS", 2)
    status, rows = call(mtp, "--steps", 1)
    assert [len(row["mtp_acceptance"]) for row in rows] == [0, 2]
    gained = [row["tokens_per_step"]["2"] for row in rows]
    assert all(1 <= each <= 3 for each in gained)
    assert status == (0 if gained[0] < gained[1] else 1)


@pytest.mark.slow
def test_optimizers_are_compared(call):
    rates = ("--adamw-rates", 1e-3, "--muon-rates", 1e-3)
    status, rows = call(muon, "--steps", 1, "--seeds", 0, *rates)
    assert status == 0
    assert [row["optimizer"] for row in rows] == ["adamw", "muon", "muon_split"]


def test_numbers_but_not_speeds_must_be_the_same(tmp_path):
    run = Run(tmp_path, [{"step": step, "loss": 3.0, "mfu": 0.1} for step in (1, 2)])
    faster = dataclasses.replace(run, records=[record | {"mfu": 0.2} for record in run.records])
    assert cpu_small.differences(run, faster) == []
    other = dataclasses.replace(run, records=[run.records[0], run.records[1] | {"loss": 3.1}])
    assert cpu_small.differences(run, other) == ["the numbers of step 2"]


def test_sparse_attention_may_be_a_little_worse():
    assert dsa_quality.judge(3.029, 3.0)[0] and dsa_quality.judge(2.0, 3.0)[0]
    holds, verdict = dsa_quality.judge(3.031, 3.0)
    assert not holds and verdict.startswith("FAILED") and "+1.03%" in verdict


@pytest.mark.parametrize(("gained", "holds"), [((1.0, 1.5, 1.8), True), ((1.0, 1.8, 1.5), False)])
def test_learning_further_ahead_must_gain(gained, holds):
    rows = [
        {"mtp_depth": depth, "tokens_per_step": {3: tokens}}
        for depth, tokens in zip((0, 1, 3), gained, strict=True)
    ]
    assert mtp.judge(rows)[0] == holds


def test_muon_split_is_said_to_beat_to_equal_or_to_be_worse():
    losses = {"adamw": [4.2, 4.1], "muon": [3.895, 4.0], "muon_split": [3.9, 3.95]}
    rows = [
        {"optimizer": name, "held_out_loss": loss} for name, own in losses.items() for loss in own
    ]
    best = muon.pick_best(rows)
    assert {name: row["held_out_loss"] for name, row in best.items()} == {
        name: min(own) for name, own in losses.items()
    }
    said = muon.compare(best)
    assert "equals Muon (+0.0050" in said and "beats AdamW (-0.2000" in said
    assert "is worse than Muon" in muon.compare(best | {"muon": {"held_out_loss": 3.5}})
