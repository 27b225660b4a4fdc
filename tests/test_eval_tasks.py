"""`glm5 eval --tasks`: tasks of lm-eval, by the command and by lm-eval itself."""

import functools
import importlib
import json
import sys

import jax
import numpy as np
import pytest

from glm5_jax.__main__ import main
from glm5_jax.inference.tokenizer import Tokenizer
from tests.likelihood import (
    CHAT_TEMPLATE,
    RAW,
    START,
    by_hand,
    model,
    write_tokenizer,
)
from tests.tiny import random_weights, write_published

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
harness = importlib.import_module("glm5_jax.inference.harness")
tasks = importlib.import_module("glm5_jax.inference.tasks")
Glm5Lm = harness.Glm5Lm


QUESTIONS = [
    {"question": "One of these", "choices": [" tokens", " es", " okes"], "answer": 1},
    {"question": "Take the", "choices": [" test", " toke", " x"], "answer": 0},
    {"question": "Is it", "choices": [" okay", " es", " no"], "answer": 2},
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = write_published(tmp_path_factory.mktemp("model"), RAW, random_weights(RAW))
    write_tokenizer(path)
    return path


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A task of multiple choice in a YAML file, its questions beside it."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    path = tmp_path / "task.yaml"
    path.write_text(
        "task: tiny_choices\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {questions}}}}}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\n'
        'doc_to_choice: "{{choices}}"\n'
        "doc_to_target: answer\n"
        'target_delimiter: ""\n'
        "metric_list: [{metric: acc}]\n"
    )
    return path


def accuracy(tokenizer, questions, frame="{}"):
    hits = []
    for each in questions:
        prompt = frame.format(each["question"])
        logprobs = [by_hand(tokenizer, prompt, choice)[0] for choice in each["choices"]]
        hits.append(int(np.argmax(logprobs)) == each["answer"])
    return sum(hits) / len(hits)


def run(capsys, *arguments):
    status = main(["eval", *map(str, arguments)])
    return status, capsys.readouterr()


def test_the_command_runs_tasks(directory, task, tmp_path, capsys):
    out = tmp_path / "results.json"
    options = ("--tasks", task, "--limit", 2, "--out", out, "--json")
    status, output = run(capsys, "--model", directory, *options)
    assert status == 0
    expected = accuracy(Tokenizer(directory), QUESTIONS[:2])
    [printed] = output.out.splitlines()
    assert json.loads(printed)["tiny_choices"]["acc,none"] == pytest.approx(expected)
    written = json.loads(out.read_text())
    assert written["results"] == json.loads(printed)
    assert written["n-samples"]["tiny_choices"] == {"original": 3, "effective": 2}


def test_lm_eval_makes_the_model_by_its_name(directory, task, capsys):
    arguments = f"pretrained={directory},max_length=64"
    lm = lm_eval.api.registry.get_model("glm5").create_from_arg_string(
        arguments, {"batch_size": 2, "device": None}
    )
    results = lm_eval.simple_evaluate(
        lm, tasks=[str(task)], task_manager=lm_eval.tasks.TaskManager(include_defaults=False)
    )
    expected = accuracy(Tokenizer(directory), QUESTIONS)
    assert results["results"]["tiny_choices"]["acc,none"] == pytest.approx(expected)


def test_lm_eval_runs_a_float16_model_in_float32(tmp_path):
    write_published(tmp_path, RAW | {"dtype": "float16"}, random_weights(RAW))
    write_tokenizer(tmp_path)
    lm = Glm5Lm.create_from_arg_string(f"pretrained={tmp_path},max_length=64")
    assert lm._scorer._model.head.dtype == "float32"
    assert jax.config.jax_default_matmul_precision == "highest"


def test_a_fault_of_the_model_is_not_told_as_one_of_a_task(task, tmp_path, monkeypatch):
    lm = Glm5Lm(model(), write_tokenizer(tmp_path))
    monkeypatch.setattr(lm._scorer, "_compute", None)
    manager = lm_eval.tasks.TaskManager(include_defaults=False)
    with pytest.raises(TypeError, match="not callable"):
        tasks.run_tasks(lm, [str(task)], manager)


def test_tasks_can_be_conversations(directory, task, tmp_path):
    (tmp_path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    tokenizer = write_tokenizer(tmp_path)
    manager = lm_eval.tasks.TaskManager(include_defaults=False)
    lm = Glm5Lm(model(), tokenizer)
    results = tasks.run_tasks(lm, [str(task)], manager, apply_chat_template=True)
    expected = accuracy(tokenizer, QUESTIONS, START + "[user]{}[assistant]")
    assert results["results"]["tiny_choices"]["acc,none"] == pytest.approx(expected)
    assert f"|tiny_choices|Yaml   |none  |     0|acc   |↑  |{expected:.4f}|" in tasks.tables(
        results
    )


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--tasks", "arc_easy", "--apply-chat-template"], "has no chat_template.jinja"),
        (["--tasks", "arc_easy,arc_hazy"], "'arc_hazy' is none, expected a YAML file or what"),
        (["--tasks", "arc_easy", "--stride", "3"], "--stride is for texts only"),
        (["--tasks", "arc_easy", "--mtp", "1"], "--mtp is for texts only"),
        (["--tasks", "arc_easy", "--out", "."], "exists already"),
    ],
)
def test_tasks_that_cannot_be_run_are_one_line(directory, capsys, options, named):
    status, output = run(capsys, "--model", directory, *options)
    assert status == 2 and output.out == ""
    assert output.err.count("\n") == 1 and named in output.err


def test_tasks_need_lm_eval(directory, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("importlib.util.find_spec", functools.partial(lambda name: None))
    status, output = run(capsys, "--model", directory, "--tasks", "arc_easy")
    assert status == 2
    assert output.err == (
        "glm5: error: tasks need the package lm-eval: pip install 'glm5-jax[eval]'\n"
    )
