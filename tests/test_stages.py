"""What a run file says, and where its stages lie in a run."""

import dataclasses

import numpy as np
import pytest

from glm5_jax.errors import InputError
from glm5_jax.model import Glm5
from glm5_jax.sharding import TRAIN, mesh_sizes
from train.__main__ import main
from train.fit import common_batch, require_fit
from train.optimizer import make_recipe
from train.run_file import READY, config_of, make_settings, read_run_file
from train.settings import Settings
from train.stages import batch_sizes, plan_stages

STAGES = [
    Settings(steps=10, batch_size=8, first_batch_size=2, batch_warmup_steps=5, length=16),
    Settings(steps=4, batch_size=4, length=64, stage="warmup"),
    Settings(steps=3, batch_size=4, length=16),
]


def test_stages_follow_one_another():
    assert [(stage.first, stage.end) for stage in plan_stages(STAGES)] == [
        (0, 10),
        (10, 14),
        (14, 17),
    ]


def test_batches_double_in_their_warm_up():
    stage = plan_stages(STAGES)[0]
    assert batch_sizes(stage.settings) == [2, 4, 8]
    sizes = [stage.batch_size(step) for step in range(10)]
    assert sizes == [2, 2, 2, 4, 4, 8, 8, 8, 8, 8]


def test_rows_are_read_one_after_the_other():
    for stage in plan_stages(STAGES):
        rows = [stage.first_row(step) for step in range(stage.first, stage.end + 1)]
        sizes = [stage.batch_size(step) for step in range(stage.first, stage.end)]
        np.testing.assert_array_equal(np.diff(rows), sizes)


def test_a_stage_reads_on_where_the_one_before_it_stopped():
    """In rows of its own length: 54 rows of 16 tokens are 13.5 of 64."""
    first, second, third = plan_stages(STAGES)
    assert first.first_row(first.end) == 54
    assert second.first_row(second.first) == 13
    assert third.first_row(third.first) == 54 + 4 * 4 * 4


def write(folder, text):
    path = folder / "run.toml"
    path.write_text(text)
    return str(path)


def test_keys_hold_for_all_stages_and_those_of_a_stage_for_it(tmp_path):
    text = """
        config = "demo"
        batch_size = 4
        learning_rate = 1
        mixture = "code=2"
        [[stages]]
        stage = "dense"
        steps = 30
        [[stages]]
        learning_rate = 0.5
        balance_rate = 0
    """
    file = read_run_file(write(tmp_path, text))
    assert file.config == "demo"
    first, second = make_settings(file.stages, {"batch_size": 2, "seed": 3})
    common = {"batch_size": 2, "seed": 3, "mixture": "code=2"}
    assert first == Settings(stage="dense", steps=30, learning_rate=1.0, **common)
    assert second == Settings(learning_rate=0.5, balance_rate=0.0, **common)


def test_a_config_is_looked_for_beside_the_run_file(tmp_path):
    (tmp_path / "small.json").write_text("{}")
    file = read_run_file(write(tmp_path, 'config = "small.json"'))
    assert file.config == str(tmp_path / "small.json") and file.stages == ({},)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (
            "steps = 1\nrate = 2\nsize = 3",
            "unknown keys rate, size, expected some of config, stages",
        ),
        ("[[stages]]\n[[stages]]\nstep = 1", "stage 2: unknown keys step"),
        ("lenght = 3\nlearning-rate = 1", "unknown keys learning-rate, lenght, expected learning_"),
        (
            "[[stages]]\nconfig = 'demo'",
            "stage 1: unknown keys config, expected some of stage,",
        ),
        ("steps = 1.5", "steps is 1.5, expected a whole number"),
        ("steps = true", "steps is True, expected a whole number"),
        ("clip = 'a'", "clip is 'a', expected a number"),
        ("stage = 3", "stage is 3, expected a string"),
        ("config = 3", "config is 3, expected a preset's name or a file"),
        ("stages = 3", "stages is 3, expected tables"),
        ("stages = []", "stages is [], expected tables"),
        ("steps = ", "is not TOML"),
        (f"steps = {'1' * 5000}", "is not TOML"),
        (f"steps = {'[' * 3000}", "is not TOML"),
        (f"learning_rate = 1{'0' * 400}", "learning_rate is inf, expected less than"),
        ("warmup_steps = 2147483648", "warmup_steps is 2147483648, expected less than"),
        ("[[stages]]\n[[stages]]\nsteps = 0", "stage 2: steps is 0, expected at least 1"),
        ("steps = -1", "steps is -1, expected at least"),
    ],
)
def test_what_is_wrong_with_a_run_file_is_named(tmp_path, text, named):
    with pytest.raises(InputError) as raised:
        make_settings(read_run_file(write(tmp_path, text)).stages, {})
    assert named in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_that_is_not_there_is_named_with_the_ready_ones():
    with pytest.raises(InputError, match=r"none\.toml: is neither a file nor .* demo"):
        read_run_file("none.toml")


@pytest.mark.parametrize("name", READY)
def test_ready_run_files_are_whole(name):
    file = read_run_file(name)
    config = config_of(file.config).config
    devices = {"single-h200": 1, "v5p-64": 32}.get(name, 2)
    stages = make_settings(file.stages, {})
    sizes = mesh_sizes("auto", devices, Glm5(config), TRAIN, common_batch(stages))
    for settings in stages:
        require_fit(config, settings, sizes)
        assert make_recipe(config, settings).learnt


@pytest.mark.parametrize(
    ("text", "weights"),
    [("", None), ("a=1", {"a": 1.0}), (" a = 1 , b=0.5,c=0", {"a": 1.0, "b": 0.5, "c": 0.0})],
)
def test_a_mixture_is_read(text, weights):
    assert Settings(mixture=text).mixture_weights() == weights


@pytest.mark.parametrize(
    "text", ["a", "a=", "=1", "a=-1", "a=nan", "a=1e39", "a=1,a=2", "a=0", "a=1,"]
)
def test_a_mixture_that_is_none_is_refused(text):
    with pytest.raises(InputError, match=f"mixture is {text}, expected NAME=WEIGHT"):
        Settings(mixture=text)


@pytest.mark.parametrize("size", [2, 5, 16, 24])
def test_batches_that_do_not_double_to_the_full_size_are_refused(size):
    with pytest.raises(InputError, match=f"first_batch_size is {size}, expected the batch_size 12"):
        dataclasses.replace(Settings(batch_size=12), first_batch_size=size)


@pytest.mark.standard_promotion
def test_the_stages_of_a_run_file_are_planned(tmp_path, capsys):
    text = """
        config = "demo"
        batch_size = 8
        length = 64
        microbatches = 2
        [[stages]]
        stage = "warmup"
        [[stages]]
        optimizer = "muon"
    """
    assert main(["plan", write(tmp_path, text), "--topology", "h100:2", "--mesh", "data=2"]) == 0
    printed = capsys.readouterr().out
    for number, stage in ((1, "warmup"), (2, "sparse")):
        assert f"stage {number}, {stage}, 8 x 64 tokens on h100:2, 2 chips: data=2" in printed
    assert printed.count("temporaries, compiled") == 2


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (
            "config = 'demo'\nbatch_size = 8\nmicrobatches = 8",
            "microbatches is 8, expected a divisor",
        ),
        ("config = 'demo'\nlength = 5000", "length is 5000, expected at most"),
        ("batch_size = 8", "there is no config"),
    ],
)
def test_a_plan_refuses_what_a_run_refuses(tmp_path, capsys, text, named):
    assert main(["plan", write(tmp_path, text), "--topology", "h100:2"]) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
