import json

import numpy as np
import pytest

from glm5_jax import console
from glm5_jax.__main__ import main as glm5
from tests.tiny import SHARED
from train.__main__ import main
from train.run import read_metrics

RAW = SHARED | {"vocab_size": 320, "num_hidden_layers": 4, "index_topk": 8}
RAW |= {"indexer_types": ["full", "full", "shared", "full"]}
RAW |= {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}
SIZES = ["--batch-size", "2", "--length", "24", "--eval-every", "4", "--eval-rows", "4"]
SIZES += ["--warmup-steps", "2", "--save-every", "3", "--learning-rate", "0.01"]

pytestmark = pytest.mark.standard_promotion


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with text, prepared data and a config."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "text").mkdir()
    for number in range(40):
        text = f"def f{number}(x):\n    return x + {number}\n" * 12
        (folder / "text" / f"{number}.py").write_text(text)
    options = ["--text", str(folder / "text"), "--vocab-size", "300", "--held-out", "0.2"]
    assert main(["prepare", str(folder / "data"), *options]) == 0
    (folder / "config.json").write_text(json.dumps(RAW))
    return folder


def train(workplace, run, steps, *options):
    arguments = [str(workplace / "data"), str(run), "--config", str(workplace / "config.json")]
    return main(["run", *arguments, "--steps", str(steps), *SIZES, *options])


@pytest.fixture(scope="module")
def finished(workplace):
    run = workplace / "finished"
    assert train(workplace, run, 7) == 0
    return run


def test_every_step_is_recorded(finished):
    records = read_metrics(finished / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 8))
    assert [record["step"] for record in records if "held_out_loss" in record] == [4, 7]
    for record in records:
        assert len(record["mtp_losses"]) == 1 and record["tokens_per_second"] > 0
        assert np.isfinite(record["loss"]) and record["gradient_norm"] > 0
        assert 1 <= record["imbalance"] <= 4 and record["index_loss"] > 0
    assert records[-1]["loss"] < records[0]["loss"]


def test_the_newest_checkpoints_are_kept(finished):
    assert sorted(path.name for path in finished.glob("step-*")) == ["step-000006", "step-000007"]


def test_a_checkpoint_is_a_model_that_generates_text(finished, capsys):
    model = ["--model", str(finished / "step-000007")]
    assert glm5(["generate", *model, "--prompt", "def f", "--max-new-tokens", "5", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["text"] and record["prompt_tokens"]


def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(workplace, finished):
    run = workplace / "resumed"
    assert train(workplace, run, 7) == 0
    for path in run.glob("step-*"):  # as if killed between the first save and the second
        path.rename(path.with_name("gone-" + path.name))
    (run / "gone-step-000006").rename(run / "step-000006")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    assert train(workplace, run, 7) == 0
    # which also shows that two runs of one seed are identical
    whole, again = (read_metrics(path / "metrics.jsonl") for path in (finished, run))
    for record in (*whole, *again):
        del record["tokens_per_second"]
    assert whole == again
    for path in (finished / "step-000007" / "params").rglob("[0-9]*"):
        twin = run / path.relative_to(finished)
        assert path.read_bytes() == twin.read_bytes(), path


def test_another_seed_trains_another_model(workplace, finished):
    assert train(workplace, workplace / "other", 3, "--seed", "1") == 0
    losses = [
        [record["loss"] for record in read_metrics(run / "metrics.jsonl")[:3]]
        for run in (finished, workplace / "other")
    ]
    assert all(a != b for a, b in zip(*losses, strict=True))


def test_the_report_draws_and_sums_up(finished, capsys):
    assert main(["report", str(finished)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["steps", "7"] and any("bits per byte" in line for line in lines)
    assert (finished / "losses.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--learning-rate", "0"], "learning_rate is 0.0, expected more than 0"),
        (["--batch-size", "0"], "batch_size is 0, expected at least 1"),
        (["--length", "2"], "length is 2, expected more than 1 + mtp_depth"),
        (["--batch-size", "5000"], "expected at least 5000 x 24"),
        (["--config", "glm-6"], "glm-6: No such file"),
        (["--config", "demo", "--length", "100000"], "expected at least"),
    ],
)
def test_a_run_that_cannot_be_is_one_line_and_leaves_nothing(workplace, capsys, options, named):
    run = workplace / "refused"
    assert train(workplace, run, 3, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("glm5-train: error: ") and error.count("\n") == 1 and named in error
    assert not run.exists()


def test_a_vocabulary_too_small_for_the_data_is_refused(workplace, capsys):
    (workplace / "small.json").write_text(json.dumps(RAW | {"vocab_size": 200}))
    run = workplace / "refused"
    assert train(workplace, run, 3, "--config", str(workplace / "small.json")) == 2
    assert "has 300 tokens, expected at most" in capsys.readouterr().err


def test_a_run_goes_on_with_its_own_settings_only(workplace, finished, capsys):
    assert train(workplace, finished, 7, "--weight-decay", "0.5") == 2
    assert "was started with weight_decay 0.1" in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_left_alone(workplace, capsys):
    assert train(workplace, workplace / "text", 3) == 2
    assert "exists already and is not a run" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_run(workplace, capsys):
    options = ("--learning-rate", "1e30", "--clip", "1e30")
    assert train(workplace, workplace / "wild", 7, *options) == 2
    assert "the loss of step" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named(workplace, capsys):
    run = workplace / "damaged"
    assert train(workplace, run, 3) == 0
    path = next((run / "step-000003" / "optimizer").rglob("0.0"))
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    assert train(workplace, run, 3) == 2
    assert "damaged" in capsys.readouterr().err


def test_an_existing_data_folder_is_left_alone(workplace, capsys):
    arguments = ["prepare", str(workplace / "data"), "--text", str(workplace / "text")]
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err


def test_bars_are_not_drawn_into_files(capsys):
    with console.progress("work", 3) as advance:
        advance(1)
    assert capsys.readouterr().err == ""
