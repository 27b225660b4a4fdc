import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.__main__ import main as convert
from glm5_jax import console
from glm5_jax.__main__ import main as glm5
from glm5_jax.checkpoint import restore_checkpoint
from glm5_jax.errors import InputError
from glm5_jax.model import Glm5, forward, logits
from glm5_jax.params import leaves_by_path
from glm5_jax.places import Places
from glm5_jax.sharding import on_one_device
from tests.text import prepare_data
from tests.tiny import SHARED, tiny_config
from train.__main__ import main
from train.checkpoint import weights
from train.data import Data
from train.evaluation import Evaluation
from train.metrics import read_metrics
from train.optimizer import make_recipe
from train.settings import Settings

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
    prepare_data(folder)
    variants = {"config": {}, "no_mtp": {"num_nextn_predict_layers": 0}}
    variants |= {"small": {"vocab_size": 200}, "short": {"max_position_embeddings": 16}}
    for name, changes in variants.items():
        (folder / f"{name}.json").write_text(json.dumps(RAW | changes))
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
    for name in ("held_out_loss", "mtp_acceptance", "index_recall", "expert_loads"):
        assert [record["step"] for record in records if name in record] == [4, 7]
    assert len(records[-1]["index_recall"]) == 5, "with the MTP layer"
    for record in records:
        assert len(record["mtp_losses"]) == 1 and record["tokens_per_second"] > 0
        assert np.isfinite(record["loss"]) and record["gradient_norm"] > 0
        assert np.isfinite(record["weight_norm"]) and record["weight_norm"] > 0
        assert 1 <= record["imbalance"] <= 4 and record["index_loss"] > 0
    assert records[-1]["loss"] < records[0]["loss"]


def test_the_newest_checkpoints_are_kept(finished):
    assert sorted(path.name for path in finished.glob("step-*")) == ["step-000006", "step-000007"]


def test_a_checkpoint_is_a_model_that_generates_text(finished, capsys):
    model = ["--model", str(finished / "step-000007")]
    assert glm5(["generate", *model, "--prompt", "def f", "--max-new-tokens", "5", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["text"] and record["prompt_tokens"]


def test_the_next_stage_starts_with_the_weights_of_the_last(workplace, finished, capsys):
    run, last = workplace / "warmup", finished / "step-000007"
    assert train(workplace, run, 2, "--stage", "warmup", "--from", str(last)) == 0
    assert re.search(
        r", indexers .*, recall 0\.\d\d, accepted [01]\.\d\d, ", capsys.readouterr().err
    )
    before, after = (
        leaves_by_path(restore_checkpoint(path)) for path in (last, run / "step-000002")
    )
    for path, weight in before.items():
        assert np.array_equal(weight, after[path]) == (".indexer." not in path), path
    assert train(workplace, run, 2, "--stage", "warmup") == 2
    assert f"was started with from '{last}', not None" in capsys.readouterr().err


def test_rounded_weights_are_no_start(workplace, finished, capsys):
    rounded, run = workplace / "rounded", workplace / "refused"
    assert convert(["quantize", str(finished / "step-000007"), str(rounded), "--to", "int8"]) == 0
    assert train(workplace, run, 2, "--from", str(rounded)) == 2
    assert "rounded: has weights in int8, expected plain ones" in capsys.readouterr().err
    assert not run.exists()


def test_weights_of_another_model_are_no_start(workplace, finished, capsys):
    config = tiny_config(RAW | {"num_nextn_predict_layers": 0})
    with pytest.raises(InputError, match=r"mtp\.block\..* has the shape .*, expected .* None"):
        weights(finished / "step-000007", config, on_one_device())


def test_another_seed_trains_another_model(workplace, finished):
    assert train(workplace, workplace / "other", 3, "--seed", "1") == 0
    losses = [
        [record["loss"] for record in read_metrics(run / "metrics.jsonl")[:3]]
        for run in (finished, workplace / "other")
    ]
    assert all(a != b for a, b in zip(*losses, strict=True))


def test_an_evaluation_is_the_mean_over_all_its_rows(workplace, finished, monkeypatch):
    """Nine rows in batches of two leave one, and rows differ in how many tokens count."""
    data = Data(workplace / "data")
    num_rows = data.split("held_out", 24).num_rows
    numbers = [number * num_rows // 9 for number in range(9)]  # spread over all that there are
    assert num_rows > 18
    model = restore_checkpoint(finished / "step-000007")
    tokens_BT, segment_BT = map(jnp.asarray, data.split("held_out", 24).rows(numbers))
    places = Places.packed(segment_BT)
    scores_BTZ = logits(model, forward(model, tokens_BT, places).hidden_BTD)
    nats_BT = -jnp.take_along_axis(
        jax.nn.log_softmax(scores_BTZ[:, :-1]), tokens_BT[:, 1:, None], axis=-1
    )[..., 0]
    counted_BT = np.asarray(places.followed(1))[:, :-1]
    assert len(set(counted_BT.sum(axis=1))) > 1

    passes = []
    monkeypatch.setattr(
        "train.evaluation.forward",
        lambda *args, **options: passes.append(args) or forward(*args, **options),
    )
    settings = Settings(length=24, batch_size=2, eval_rows=9)
    objective = make_recipe(model.config, settings).objective
    result = Evaluation(data, model.config, objective, settings, on_one_device())(
        leaves_by_path(on_one_device().place(model, Glm5(model.config)))
    )
    expected = np.asarray(nats_BT)[counted_BT].mean()
    np.testing.assert_allclose(result["held_out_loss"], expected, rtol=1e-5)
    bits = expected / np.log(2) / data.bytes_per_token("held_out")
    np.testing.assert_allclose(result["bits_per_byte"], bits, rtol=1e-5)
    assert len(passes) == 1, "compiled once for all batches"


def test_the_report_draws_and_sums_up(finished, capsys):
    assert main(["report", str(finished)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["steps", "7"] and any("bits per byte" in line for line in lines)
    assert (finished / "report" / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert lines[-1].split() == ["page", str(finished / "report" / "index.html")]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--learning-rate", "0"], "learning_rate is 0.0, expected more than 0"),
        (["--learning-rate", "1e39"], "learning_rate is 1e+39, expected less than 3.4e+38"),
        (["--batch-size", "0"], "batch_size is 0, expected at least 1"),
        (["--length", "2"], "length is 2, expected more than 1 + mtp_depth"),
        (["--batch-size", "5000"], "expected at least 5000 x 24"),
        (["--config", "glm-6"], "glm-6: is neither a file nor one of the presets"),
        (["--config", "demo", "--length", "100000"], "length is 100000, expected at most"),
        (["--config", "{}/short.json"], "length is 24, expected at most"),
        (["--config", "{}/no_mtp.json"], "mtp_depth is 1, expected 0"),
        (["--config", "{}/small.json"], "has 300 tokens, expected at most"),
        (["--seed", "4294967296"], "seed is 4294967296, expected less than 4294967296"),
        (["--from", "{}/data"], "data: is no native checkpoint"),
        (["--warmup-steps", "50", "--mixture", "x=1"], "mixture names 'x', expected"),
    ],
)
def test_a_run_that_cannot_be_is_one_line_and_leaves_nothing(workplace, capsys, options, named):
    run = workplace / "refused"
    assert train(workplace, run, 3, *(option.format(workplace) for option in options)) == 2
    error = capsys.readouterr().err
    assert error.startswith("glm5-train: error: ") and error.count("\n") == 1 and named in error
    assert not run.exists()


def test_a_run_goes_on_with_its_own_settings_only(workplace, finished, capsys):
    assert train(workplace, finished, 7, "--weight-decay", "0.5") == 2
    assert "was started with weight_decay 0.1" in capsys.readouterr().err


def test_a_run_that_saved_nothing_may_begin_with_other_settings(workplace, tmp_path, monkeypatch):
    run = tmp_path / "run"

    def fail(*_):
        raise InputError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr("train.loop.make_record", fail)
        assert train(workplace, run, 3) == 2
    assert sorted(path.name for path in run.iterdir()) == ["metrics.jsonl", "run.json"]
    assert train(workplace, run, 2, "--weight-decay", "0.5") == 0
    assert json.loads((run / "run.json").read_text())["stages"][0]["weight_decay"] == 0.5


def test_data_that_are_none_are_named(workplace, tmp_path, capsys):
    assert main(["run", str(tmp_path), str(tmp_path / "run"), "--config", "demo"]) == 2
    assert f"error: {tmp_path}: has no data.json, expected what" in capsys.readouterr().err


def test_settings_that_no_number_depends_on_may_change(workplace, finished):
    options = ["--keep", "3", "--save-every", "2", "--eval-every", "3", "--eval-rows", "2"]
    assert train(workplace, finished, 7, *options, "--remat", "layers") == 0


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"config": 3}', "config is 3, expected an object"),
        ('{"config": {}}', "has no architectures, "),
        ("[]", "expected a JSON object"),
    ],
)
def test_a_malformed_description_of_a_run_is_named(workplace, tmp_path, capsys, text, named):
    (tmp_path / "run.json").write_text(text)
    assert train(workplace, tmp_path, 3) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'run.json'}: " in error and named in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"loss": None}, "loss is None, expected a number"),
        (None, "expected a JSON object"),
    ],
)
def test_a_damaged_line_of_metrics_is_named(finished, tmp_path, capsys, changes, named):
    record = read_metrics(finished / "metrics.jsonl")[0]
    damaged = None if changes is None else record | changes
    lines = "".join(json.dumps(line) + "\n" for line in (record, damaged))
    (tmp_path / "metrics.jsonl").write_text(lines)
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"metrics.jsonl: line 2: {named}" in error and error.count("\n") == 1


def test_a_folder_that_is_no_run_is_left_alone(workplace, capsys):
    assert train(workplace, workplace / "text", 3) == 2
    assert "exists already and is not a run" in capsys.readouterr().err


def test_too_many_skipped_steps_end_the_run(workplace, capsys):
    """Weights that have no norm are taken in no step; the last good ones are saved."""
    run = workplace / "lost"
    options = ("--learning-rate", "1e30", "--most-skipped", "3", "--save-every", "100")
    assert train(workplace, run, 7, *options) == 2
    error = capsys.readouterr().err
    assert "in 3 steps in a row, up to step 4, see metrics.jsonl" in error
    records = read_metrics(run / "metrics.jsonl")
    assert [record.get("skipped", False) for record in records] == [False, True, True, True]
    assert np.isfinite([record["weight_norm"] for record in records]).all()
    [saved] = run.glob("step-*")
    assert saved.name == "step-000004"
    leaves = jax.tree.leaves(restore_checkpoint(saved))
    assert all(np.isfinite(leaf).all() for leaf in leaves)


def test_an_existing_data_folder_is_left_alone(workplace, capsys):
    arguments = ["prepare", str(workplace / "data"), "--text", str(workplace / "text")]
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err


def test_bars_are_not_drawn_into_files(capsys):
    with console.progress("work", 3) as advance:
        advance(1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("share", ["1", "1.5", "-0.1", "nan"])
def test_a_share_that_is_not_one_is_refused(tmp_path, capsys, share):
    with pytest.raises(SystemExit, match="2"):
        main(["prepare", str(tmp_path / "data"), "--held-out", share])
    assert f"--held-out: is '{share}', expected" in capsys.readouterr().err


def test_the_help_says_which_options_are_whole_numbers(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["run", "--help"])
    text = capsys.readouterr().out
    assert "--steps N " in text and "--learning-rate X " in text
