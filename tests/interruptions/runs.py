"""Runs that are begun, left and compared."""

import re
import shutil
import signal

from tests.test_train_command import RAW as LARGER
from train import loop
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


def command(workplace, run, *options):
    file = str(workplace / "stages.toml")
    return ["run", str(workplace / "data"), str(run), "--file", file, *map(str, options)]


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


def stop_at(monkeypatch, step, number=signal.SIGTERM):
    """Sends a signal to this process when a step is recorded."""
    make_record = loop.make_record

    def record(at, *arguments):
        if at == step:
            signal.raise_signal(number)
        return make_record(at, *arguments)

    monkeypatch.setattr(loop, "make_record", record)


def copy(whole, to, *steps):
    """A run that was left after the last of the steps."""
    shutil.copytree(whole, to)
    for path in to.glob("step-*"):
        if int(path.name[5:]) not in steps:
            shutil.rmtree(path)
    return to
