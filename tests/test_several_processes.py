"""Two processes of four devices each against one process: the model, and every command."""

import json
import shutil
import signal
import time

import numpy as np
import openai
import pytest

from glm5_jax.__main__ import main as glm5
from glm5_jax.checkpoint import restore_checkpoint
from glm5_jax.inference.generate import Generator
from glm5_jax.inference.request import Sampling
from glm5_jax.params import leaves_by_path
from tests import test_sharded as sharded
from tests.serving import write_model
from tests.text import prepare_data
from tests.tiny import random_weights, write_published
from tests.together import run_together, started_together
from train.__main__ import main as glm5_train
from train.metrics import read_metrics

# In the first the batch is divided over the processes, in the second each layer is.
on_meshes = pytest.mark.parametrize("shape", ["2x2x2", "1x1x8"])
# Fewer kinds of layers compile faster; all of them are compared with one device.
RAW = sharded.RAW | {
    "vocab_size": 320,
    "num_hidden_layers": 2,
    "indexer_types": ["full", "full"],
    "mlp_layer_types": ["dense", "sparse"],
}
# The rate is low: of a gradient that is all rounding Adam makes a step of that size, after which
# rounding may decide what is selected for a held-out token.
STAGES = """
config = "config.json"
batch_size = 8
length = 24
learning_rate = 0.001
warmup_steps = 1
eval_every = 2
eval_rows = 10
save_every = 1
keep = 4

[[stages]]
stage = "dense"
steps = 2

[[stages]]
stage = "sparse"
steps = 2
"""


@pytest.mark.slow
@on_meshes
def test_the_model_is_that_of_one_device(shape, tmp_path):
    """Logits, MTP logits, router loads, losses, gradients of all leaves, text, rows of data."""
    ended = run_together(*[("tests.process_worker", "work", shape, tmp_path)] * 2)
    assert ended == [(0, "", "")] * 2
    scores, loads = sharded.on_one_device(sharded.predict)
    learnt = sharded.on_one_device(sharded.learn)
    expected = leaves_by_path({"scores": scores, "loads": loads, "learnt": learnt})
    text = Generator(sharded.model()).complete(sharded.PROMPTS, 12, Sampling())
    for process in range(2):
        written = json.loads((tmp_path / f"{shape}-{process}.json").read_text())
        assert written[0] == [list(completion) for completion in text]
        assert written[1] == [[[sign * row] * 3 for row in range(16)] for sign in (1, -1)]
        first, end = (8 * process, 8 * process + 8) if shape == "2x2x2" else (0, 16)
        assert written[2] == list(range(first, end))
        with np.load(tmp_path / f"{shape}-{process}.npz") as file:
            actual = dict(file)
        assert actual.keys() == expected.keys() and len(actual) > 60
        for name, value in expected.items():
            real = sharded.SEGMENTS > 0 if name.startswith("scores") else ...
            sharded.assert_equal(actual[name][real], np.asarray(value)[real])


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return write_published(tmp_path_factory.mktemp("model"), RAW, random_weights(RAW), 2)


def twice(*command):
    """Two processes of a command that goes well; what the first printed and showed."""
    first, second = run_together(command, command)
    assert (first.status, second) == (0, (0, "", "")), (first, second)
    return first.output, first.errors


@pytest.mark.slow
def test_generating_prints_the_same_text_once(published, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    given = [{"prompt_tokens": tokens} for tokens in ([5, 7, 11], [13], [17, 19])]
    prompts.write_text("".join(json.dumps(each) + "\n" for each in given))
    command = ["generate", "--model", str(published), "--prompts", str(prompts), "--json"]
    command += ["--max-new-tokens", "9", "--mesh", "data=2,model=4"]
    assert glm5(command) == 0
    alone = capsys.readouterr()
    assert twice("glm5_jax", *command) == (alone.out, "8 cpu devices: data=2,expert=1,model=4\n")
    assert len(alone.out.splitlines()) == 3
    command[command.index("--mesh") + 1] = "model=8"
    warm = [*command, "--temperature", "1.0"]
    assert glm5(warm) == 0
    assert twice("glm5_jax", *warm)[0] == capsys.readouterr().out != alone.out


@pytest.mark.slow
def test_a_server_of_two_processes_answers_as_one_process_generates(tmp_path, capsys):
    """And ends in both when the first is told to; the signal that all get is for that one."""
    model, prompts = write_model(tmp_path / "model"), ["one", "two, three", "x" * 70]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    options = ["--max-new-tokens", "9", "--json", "--temperature", "1", "--mesh", "data=2,model=4"]
    assert glm5(["generate", "--model", str(model), "--prompts", str(file), *options]) == 0
    expected = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    command = ["glm5_jax", "serve", "--model", model, "--port", 0, "--context", 256]
    command += ["--mesh", "data=2,model=4"]
    with started_together(command, command) as processes:
        address = processes[0].stdout.readline().split(" at ")[1].strip()
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        whole = client.completions.create(
            model="model", prompt=prompts[0], max_tokens=9, seed=0, temperature=1
        )
        assert whole.choices[0].text == expected[0]["text"]
        for prompt in prompts[1:]:
            stream = client.completions.create(
                model="model", prompt=prompt, max_tokens=9, temperature=0, stream=True
            )
            assert next(iter(stream)).choices[0].text
            stream.close()
        again = client.completions.create(
            model="model", prompt=prompts[0], max_tokens=9, seed=0, temperature=1
        )
        assert again.choices[0].text == whole.choices[0].text
        client.close()
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs


@pytest.mark.slow
def test_scores_are_written_once_and_are_those_of_one_process(published, tmp_path):
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, sharded.TOKENS[:3])
    command = ["score", "--model", str(published), "--tokens", str(tokens), "--mtp", "2"]
    command += ["--mesh", "data=2,expert=2,model=2", "--out"]
    (tmp_path / "alone").mkdir()
    assert glm5([*command, str(tmp_path / "alone" / "out.npz")]) == 0
    together = tmp_path / "together" / "out.npz"
    output, _ = twice("glm5_jax", *command, together)
    assert output.startswith(f"{together}: logits [3, 22, 320]")
    assert [path.name for path in together.parent.iterdir()] == ["out.npz"]
    with np.load(tmp_path / "alone" / "out.npz") as file, np.load(together) as other:
        assert file.keys() == other.keys() and len(file) == 4
        for name in file:
            scale = np.abs(file[name]).max()
            np.testing.assert_allclose(other[name], file[name], rtol=0, atol=1e-5 * scale)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with prepared data, a config and a run of two stages."""
    folder = tmp_path_factory.mktemp("work")
    prepare_data(folder)
    (folder / "config.json").write_text(json.dumps(RAW))
    (folder / "run.toml").write_text(STAGES)
    return folder


def training(workplace, run, mesh):
    file = str(workplace / "run.toml")
    return ["run", str(workplace / "data"), str(run), "--file", file, "--mesh", mesh]


def cut_off(run, step):
    """Leaves a run as if it had been killed after a step was saved."""
    for path in run.glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_a_run_goes_on_with_other_processes_and_meshes(workplace):
    """Within a stage, at its end, and from one to the next without a stop."""
    alone, together = workplace / "alone", workplace / "together"
    assert glm5_train(training(workplace, alone, "data=8")) == 0
    output, errors = twice("train", *training(workplace, together, "data=4,expert=2"))
    assert output == f"{together / 'step-000004'}: trained for 4 steps\n"
    assert errors.count("step 2: ") == errors.count("step 4: ") == 1 == errors.count("devices: ")
    assert errors.count("stage 2: sparse\n") == 1
    saved = [f"step-00000{step}" for step in (1, 2, 3, 4)]
    assert sorted(path.name for path in together.iterdir()) == ["metrics.jsonl", "run.json", *saved]
    require_equal_runs(together, alone)

    cut_off(together, 2)
    assert glm5_train(training(workplace, together, "data=2,expert=2,model=2")) == 0
    require_equal_runs(together, alone)

    cut_off(together, 1)
    _, errors = twice("train", *training(workplace, together, "expert=8"))
    assert "goes on from step-000001" in errors
    require_equal_runs(together, alone)


@pytest.mark.slow
def test_a_signal_to_one_process_ends_a_run_in_all_after_the_same_step(workplace):
    run = workplace / "signalled"
    command = training(workplace, run, "data=8")
    command += ["--steps", "100000", "--save-every", "100000"]
    with started_together(("train", *command), ("train", *command)) as processes:
        metrics = run / "metrics.jsonl"
        while not metrics.exists() or not metrics.read_text():
            assert processes[0].poll() is None
            time.sleep(0.05)
        processes[1].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    (saved,) = run.glob("step-*")
    assert f"{saved}: stopped by SIGTERM after " in outputs[0][0] and not outputs[1][0]
    assert read_metrics(metrics)[-1]["step"] == int(saved.name.removeprefix("step-"))
    restore_checkpoint(saved)


def require_equal_runs(run, other):
    """The same metrics of every step, and a last checkpoint that is whole.

    The indexers' loss is a small difference of numbers near 1, so that rounding shows sooner.
    """
    records, expected = (read_metrics(path / "metrics.jsonl") for path in (run, other))
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert [record["stage"] for record in records] == ["dense", "dense", "sparse", "sparse"]
    for record, one in zip(records, expected, strict=True):
        assert record.keys() == one.keys()
        for name in record.keys() - {"stage", "tokens_per_second", "tokens_per_second_per_device"}:
            np.testing.assert_allclose(record[name], one[name], rtol=2e-6, atol=1e-8, err_msg=name)
    restore_checkpoint(run / "step-000004")


def generating(model, *options):
    flags = ["--model", str(model), "--prompt-tokens", "5", "--max-new-tokens", "3"]
    return "glm5_jax", "generate", *flags, *options


def assert_each_ends_with_one_line(ended, *named):
    for process in ended:
        assert process.status == 2 and process.output == ""
        assert process.errors.count("\n") == 1 and any(text in process.errors for text in named)


def test_an_error_in_all_processes_is_one_line_in_each(published, tmp_path):
    ended = run_together(*[generating(tmp_path / "nowhere")] * 2, seconds=60)
    assert_each_ends_with_one_line(ended, "nowhere: is not a directory")
    ended = run_together(*[generating(published, "--mesh", "data=3")] * 2, seconds=60)
    assert_each_ends_with_one_line(ended, "--mesh data=3,expert=1,model=1 is for 3 devices")


def test_processes_with_other_arguments_are_named(published):
    ended = run_together(*(generating(published, "--seed", seed) for seed in "01"), seconds=60)
    assert_each_ends_with_one_line(ended, "argument seed is '0' in process 0 and '1' in process 1")


def test_processes_that_read_other_prompts_are_named(published, tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    for number, folder in enumerate(folders):
        folder.mkdir()
        (folder / "prompts.jsonl").write_text(json.dumps({"prompt_tokens": [5 + number]}))
    command = ["glm5_jax", "generate", "--model", published, "--prompts", "prompts.jsonl"]
    command += ["--max-new-tokens", "3"]
    ended = run_together(command, command, folders=folders, seconds=60)
    assert_each_ends_with_one_line(ended, "digest of the requests is '")
    (folders[1] / "prompts.jsonl").unlink()
    ended = run_together(command, command, folders=folders, seconds=60)
    assert_each_ends_with_one_line(ended, "prompts.jsonl: No such file")


def test_processes_that_do_not_share_the_run_are_named(workplace, tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    command = ("train", *training(workplace, "run", "data=8"))
    ended = run_together(command, command, folders=folders, seconds=60)
    assert_each_ends_with_one_line(ended, "run/run.json is 'there' in process 0 and 'missing' in")
