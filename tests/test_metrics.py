import json
import math

import pytest

from glm5_jax.errors import InputError
from train.metrics import forget_later_steps, read_metrics, shown, to_line

STEP = {
    "step": 1,
    "stage": "sparse",
    "loss": 2.5,
    "mtp_losses": [2.75],
    "index_loss": 0.5,
    "index_losses": [0.25, 0.75],
    "tokens_per_second": 12345.6,
}
EVALUATED = {"held_out_loss": 2.0, "bits_per_byte": 1.0}


def written(path, *records):
    path.write_text("".join(map(to_line, records)))
    return path


def test_every_record_stands_alone(tmp_path):
    """Stages of one run may look ahead to different depths, and have other things to say."""
    old = {key: value for key, value in STEP.items() if key != "stage"}
    records = [STEP, old | {"step": 2, "mtp_losses": []}, STEP | EVALUATED | {"step": 3}]
    assert read_metrics(written(tmp_path / "metrics.jsonl", *records)) == records


def test_what_is_not_finite_in_a_skipped_step_is_null(tmp_path):
    skipped = STEP | {"skipped": True, "loss": math.nan, "mtp_losses": [math.inf]}
    path = written(tmp_path / "metrics.jsonl", skipped | {"gradient_norm": math.inf}, STEP)
    (first, _) = read_metrics(path)
    assert (first["loss"], first["mtp_losses"], first["gradient_norm"]) == (None, [None], None)
    forget_later_steps(path, 1)
    assert read_metrics(path)[0] == first
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_line(STEP | {"loss": math.nan})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"loss": None}, "loss is None, expected a number"),
        ({"loss": None, "skipped": 1}, "loss is None, expected a number"),
        ({"held_out_loss": None, "skipped": True}, "held_out_loss is None, expected a number"),
        ({"step": None, "skipped": True}, "step is None, expected a whole number"),
        ({"step": 2.5}, "step is 2.5, expected a whole number"),
        ({"mtp_losses": [[]]}, r"mtp_losses is \[\[\]\], expected a list of numbers"),
        ({"mtp_losses": None}, "mtp_losses is None, expected a list of numbers"),
        ({"held_out_loss": 1.0}, "bits_per_byte is None, expected a number"),
        ({"mfu": "high"}, "mfu is 'high', expected a number"),
        ({"index_recall": 1}, "index_recall is 1, expected a list of numbers"),
        ({"expert_loads": [[1], [1, 2]]}, "expert_loads is .*, expected lists of numbers, all as"),
        ({"stage": "$x$"}, "stage is .*, expected a word"),
    ],
)
def test_a_damaged_record_is_named(tmp_path, changes, named):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in (STEP, STEP | changes)))
    with pytest.raises(InputError, match=f"metrics.jsonl: line 2: {named}"):
        read_metrics(path)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "loss 2.500, 12,346 tokens/s"),
        ({"tokens_per_second_per_device": 12345.6}, "loss 2.500, 12,346 tokens/s"),
        (
            {"tokens_per_second_per_device": 1543.2, "mfu": 0.4149},
            "loss 2.500, 12,346 tokens/s, 1,543 per device, MFU 41%",
        ),
        ({"stage": "warmup"}, "indexers 0.500, 12,346 tokens/s"),
        ({"skipped": True, "loss": math.nan}, "update skipped, 12,346 tokens/s"),
    ],
)
def test_a_progress_bar_says_what_is_learnt_and_how_fast(changes, text):
    assert shown(STEP | changes) == text


def test_weights_are_gone_on_with_whatever_became_of_their_history(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    forget_later_steps(path, 1)
    assert not path.exists()
    path.write_text(to_line(STEP) + "{damaged\n")
    damaged = path.read_bytes()
    forget_later_steps(path, 1)
    assert not path.exists()
    assert (tmp_path / "damaged-metrics.jsonl").read_bytes() == damaged
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "metrics.jsonl: line 2: not valid JSON" in told
