"""A run that is killed again and again ends as if it had not been."""

import json
import multiprocessing
import random
import signal
import time

import pytest

from tests.interruptions.runs import RAW, STAGES, assert_same_end, command
from tests.killed import train_in_a_process

pytestmark = pytest.mark.standard_promotion


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
