import math
import subprocess
import sys
import types

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from glm5_jax.errors import InputError
from train.sinks import open_sinks

SETTINGS = {"steps": 5, "learning_rate": 1e-3}


def record(step, scale=1.0):
    return {
        "step": step,
        "stage": "sparse",
        "loss": scale * 2.7 / step,
        "mtp_losses": [3.1 / step, 3.3 / step],
        "index_losses": [],
    }


def write(run, *records, tensorboard=False, wandb=None):
    with open_sinks(run, tensorboard, wandb, SETTINGS) as sinks:
        for each in records:
            sinks.write(each)


def read(run):
    """The numbers of every step by name, as TensorBoard reads them."""
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


def test_nothing_is_written_unless_asked_for(tmp_path):
    write(tmp_path, record(1))
    assert not list(tmp_path.iterdir())


def test_tensorboard_reads_the_same_numbers(tmp_path):
    write(tmp_path, *map(record, range(1, 6)), tensorboard=True)
    found = read(tmp_path)
    assert set(found) == {"loss", "mtp_losses/00", "mtp_losses/01"}
    for step in range(1, 6):
        assert found["loss"][step] == np.float32(2.7 / step)
        assert found["mtp_losses/01"][step] == np.float32(3.3 / step)


def test_what_is_no_number_is_left_out(tmp_path):
    others = {"skipped": True, "loss": math.nan, "mtp_losses": [None, math.inf, 3.0]}
    others |= {"expert_loads": [[0.5, 0.5]], "gradient_norm": None}
    write(tmp_path, record(1) | others, tensorboard=True)
    assert read(tmp_path) == {"mtp_losses/02": {1: 3.0}}


def test_steps_that_are_taken_again_are_there_once(tmp_path):
    write(tmp_path, *map(record, range(1, 6)), tensorboard=True)
    write(tmp_path, *(record(step, scale=10) for step in (4, 5, 6)), tensorboard=True)
    write(tmp_path, tensorboard=True)  # ended before its first step
    assert len(list((tmp_path / "tensorboard").iterdir())) == 3
    scales = {step: 10 if step > 3 else 1 for step in range(1, 7)}
    expected = {step: np.float32(scale * 2.7 / step) for step, scale in scales.items()}
    assert read(tmp_path)["loss"] == expected


def test_a_killed_run_leaves_what_it_wrote(tmp_path):
    code = f"""
import os, pathlib
from train.sinks import open_sinks
with open_sinks(pathlib.Path({str(tmp_path)!r}), True, None, {{}}) as sinks:
    sinks.write({record(1)!r})
    os._exit(1)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], check=False)
    assert done.returncode == 1 and read(tmp_path)["loss"] == {1: np.float32(2.7)}


class FakeWandb(types.ModuleType):
    """Remembers what it is asked, as the package would answer it."""

    Error = type("Error", (Exception,), {})

    def __init__(self):
        super().__init__("wandb")
        self.begun, self.logged, self.finished = [], [], 0

    def init(self, **options):
        self.begun.append(options)
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.finished += 1

    def log(self, numbers, step):
        self.logged.append((step, numbers))


def test_a_run_that_goes_on_is_the_same_in_wandb(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run = tmp_path / "mine"
    run.mkdir()
    for step in (1, 2):
        write(run, record(step), wandb="project")
    first, second = fake.begun
    assert first == second and first["resume"] == "allow" and len(first["id"]) == 32
    assert (first["project"], first["name"], first["dir"]) == ("project", "mine", str(run))
    assert first["config"] == SETTINGS and fake.finished == 2
    numbers = {"loss": 2.7, "mtp_losses/00": 3.1, "mtp_losses/01": 3.3}
    assert fake.logged[0] == (1, numbers) and fake.logged[1][0] == 2


def test_what_wandb_refuses_is_one_line(tmp_path, monkeypatch):
    fake = FakeWandb()

    def refuse(**options):
        raise fake.Error("no API key")

    fake.init = refuse
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(InputError, match="wandb: no API key"):
        write(tmp_path, wandb="project")


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, package):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(package), *sys.meta_path])
    asked = {"tensorboard": {"tensorboard": True}, "wandb": {"wandb": "project"}}
    with pytest.raises(InputError, match=rf"{package} is missing: pip .*glm5-jax\[{package}\]'"):
        write(tmp_path, **asked[package])
    assert not list(tmp_path.iterdir())


class Missing:
    """Finds no module of a package, as if it were not installed."""

    def __init__(self, package):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=self.package)
