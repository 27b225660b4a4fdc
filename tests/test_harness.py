"""Answers to lm-eval's requests, by hand and against lm-eval's own model for transformers."""

import functools
import importlib
import json
import sys

import numpy as np
import pytest

from glm5_jax.__main__ import main
from glm5_jax.errors import InputError
from glm5_jax.inference.generate import Generator
from glm5_jax.inference.request import Sampling
from glm5_jax.inference.tokenizer import Tokenizer
from tests.likelihood import (
    END,
    RAW,
    START,
    TEXT,
    model,
    partition,
    predictions,
    write_tokenizer,
)
from tests.tiny import build_model, random_weights, write_published

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
harness = importlib.import_module("glm5_jax.inference.harness")
tasks = importlib.import_module("glm5_jax.inference.tasks")
Glm5Lm = harness.Glm5Lm
Instance = lm_eval.api.instance.Instance

PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is ", "Rome, and so on"),  # the space goes to the continuation
    ("", "No context at all"),
    (" ", "A space only"),
    (TEXT, " Yes."),
    ("A", " b"),
]
QUESTIONS = [
    {"question": "One of these", "choices": [" tokens", " es", " okes"], "answer": 1},
    {"question": "Take the", "choices": [" test", " toke", " x"], "answer": 0},
    {"question": "Is it", "choices": [" okay", " es", " no"], "answer": 2},
]


@pytest.fixture(scope="module", params=[(), (START, "$A")], ids=["plain", "special"])
def tokenizer(request, tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), request.param)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def requests(kind, arguments):
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


def by_hand(tokenizer, context, continuation, most=256):
    """The sum of log-probabilities, and whether all tokens are the likeliest, token by token."""
    special = tokenizer.encode("")  # before a text, or nothing
    stripped = context.rstrip(" ")
    whole = tokenizer.encode(context + continuation, special=False)
    count = len(whole) - len(tokenizer.encode(stripped, special=False))
    tokens = [*(special or ([] if stripped else [1])), *whole][-(most + 1) :]
    # One token more than the model reads at most, for the last is not read.
    rows = predictions(tokens[:-1])[-count:]
    given = [row[token] for row, token in zip(rows, tokens[-count:], strict=True)]
    return float(np.sum(given)), bool((rows.argmax(-1) == tokens[-count:]).all())


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_likelihoods_are_those_of_the_model(tokenizer, shape):
    lm = Glm5Lm(model(), tokenizer, partition(shape), batch_size=4)
    actual = lm.loglikelihood(requests("loglikelihood", PAIRS))
    for (logprob, is_greedy), pair in zip(actual, PAIRS, strict=True):
        expected, expected_greedy = by_hand(tokenizer, *pair)
        assert logprob == pytest.approx(expected, abs=1e-3)
        assert is_greedy == expected_greedy


def greedily(tokenizer, prompt, count):
    """A greedy continuation that is the same again when it is encoded."""
    [completion] = Generator(model(), num_tokens=tokenizer.num_tokens).complete(
        [tokenizer.encode(prompt)], count, Sampling()
    )
    return completion.tokens


def test_a_greedy_continuation_is_told(plain):
    [(prompt, tokens)] = [
        (prompt, tokens)
        for prompt in ("ab", "cd", "ef", "gh", "ij", "kl")
        for tokens in [greedily(plain, prompt, 1)]
        if plain.encode(prompt + plain.decode(tokens)) == plain.encode(prompt) + tokens
    ][:1]
    lm = Glm5Lm(model(), plain)
    other = "x" if plain.decode(tokens) != "x" else "y"
    pairs = [(prompt, plain.decode(tokens)), (prompt, other)]
    actual = lm.loglikelihood(requests("loglikelihood", pairs))
    assert [is_greedy for _, is_greedy in actual] == [True, False]
    assert actual[0][0] > actual[1][0]


def test_long_contexts_lose_their_beginning(plain):
    lm = Glm5Lm(model(), plain, max_length=6)
    [(actual, _)] = lm.loglikelihood(requests("loglikelihood", [(TEXT, " Yes.")]))
    assert actual == pytest.approx(by_hand(plain, TEXT, " Yes.", 6)[0], abs=1e-3)
    assert abs(actual - by_hand(plain, TEXT, " Yes.")[0]) > 1e-2


def test_rolling_likelihoods_are_those_of_a_text_after_the_prefix(tokenizer):
    texts = [(TEXT,), ("Short.",), ("",)]
    lm = Glm5Lm(model(), tokenizer, batch_size=2)
    actual = lm.loglikelihood_rolling(requests("loglikelihood_rolling", texts))
    expected = [by_hand(tokenizer, "", text)[0] for (text,) in texts[:2]]
    np.testing.assert_allclose(actual, [*expected, 0], atol=1e-3)


def test_rolling_windows_begin_with_the_token_before(plain):
    """With a window of 16 tokens, as lm-eval documents it."""
    tokens = plain.encode(TEXT)
    lm = Glm5Lm(model(), plain, max_length=16)
    [actual] = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(TEXT,)]))
    expected, known = 0.0, [lm.prefix_token_id, *tokens]
    for first in range(0, len(tokens), 16):
        end = min(first + 16, len(tokens))
        window = known[end - 16 : end + 1] if first else known[: end + 1]
        rows = predictions(window[:-1])
        expected += sum(rows[place][window[place]] for place in range(first - end, 0))
    assert actual == pytest.approx(expected, abs=1e-3)


TEMPLATE = (
    START + "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def chatting(tokenizer, tmp_path):
    """The same tokenizers, with a chat template that begins with the special token."""
    special = (START, "$A") if tokenizer.encode("") else ()
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    return write_tokenizer(tmp_path, special)


def test_conversations_have_the_special_prefix_once(chatting):
    lm = Glm5Lm(model(), chatting)
    prompt = lm.apply_chat_template([{"role": "user", "content": "Yes?"}])
    assert prompt == START + "[user]Yes?[assistant]"
    plain = chatting.encode("[user]Yes?[assistant]", special=False)
    assert lm.tok_encode(prompt) == [0, *plain]


def test_a_conversation_may_begin_the_answer(chatting):
    history = [{"role": "user", "content": "Yes?"}, {"role": "assistant", "content": "It"}]
    prompt = Glm5Lm(model(), chatting).apply_chat_template(history, add_generation_prompt=False)
    assert prompt == START + "[user]Yes?[assistant]It"


def generate(lm, *contexts, **options):
    pairs = [(context, options) for context in contexts]
    return lm.generate_until(requests("generate_until", pairs))


def test_texts_are_greedy_and_end_before_a_stop_string(plain):
    lm = Glm5Lm(model(), plain, batch_size=2)
    contexts = ("Take", "One of these tokens", TEXT)
    whole = generate(lm, *contexts, max_gen_toks=12)
    assert whole == [plain.decode(greedily(plain, context, 12)) for context in contexts]
    stop = whole[1][3:5]
    cut = generate(lm, *contexts, max_gen_toks=12, until=[stop, "never"])
    assert cut == [text.partition(stop)[0] for text in whole]
    assert cut[1] != whole[1]


def test_a_stop_token_ends_a_text_and_is_not_shown(plain):
    tokens = greedily(plain, "Take", 8)
    lm = Glm5Lm(model(), plain, stop=frozenset([tokens[4]]))
    [text] = generate(lm, "Take", max_gen_toks=8)
    assert text == plain.decode(tokens[: tokens.index(tokens[4])])


def test_long_prompts_leave_room_for_new_tokens(plain):
    lm = Glm5Lm(model(), plain, max_length=20)
    prompt = plain.encode(TEXT)[-8:]
    [completion] = Generator(model(), num_tokens=plain.num_tokens).complete(
        [prompt], 12, Sampling()
    )
    assert generate(lm, TEXT, max_gen_toks=12) == [plain.decode(completion.tokens)]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"do_sample": True, "temperature": 0.7}, "temperature 0.7, expected greedy"),
        ({"max_gen_toks": 256}, "wants 256 new tokens, expected from 1 to 255"),
        ({"max_gen_toks": 0}, "wants 0 new tokens"),
    ],
)
def test_texts_that_cannot_be_generated_are_refused(plain, options, named):
    with pytest.raises(InputError, match=named):
        generate(Glm5Lm(model(), plain), "Take", **options)


def test_a_continuation_without_tokens_is_refused(plain):
    with pytest.raises(InputError, match="continuation '' has 0 tokens"):
        Glm5Lm(model(), plain).loglikelihood(requests("loglikelihood", [("Take", "")]))


@pytest.mark.parametrize("length", [1, 257])
def test_more_than_the_model_can_take_is_refused(plain, length):
    with pytest.raises(InputError, match=f"max_length is {length}, expected from 2 to"):
        Glm5Lm(model(), plain, max_length=length)


@pytest.mark.slow
def test_answers_are_those_of_lm_evals_model_for_transformers(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate, which HFLM needs, is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from lm_eval.models.huggingface import HFLM

    from tests.reference.hf import HF_LATENT_EPS, hf_model

    tokenizer = write_tokenizer(tmp_path)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token=END, pad_token=END
    )
    weights = random_weights(RAW)
    # transformers generates ids that pad the vocabulary too, were they ever the likeliest.
    weights["lm_head.weight"][tokenizer.num_tokens :] = 0
    theirs = HFLM(hf_model(RAW, weights), tokenizer=fast, max_length=40, batch_size=1, device="cpu")
    ours = Glm5Lm(
        build_model(RAW | HF_LATENT_EPS, weights), tokenizer, stop=frozenset([1]), max_length=40
    )
    pairs = requests("loglikelihood", [pair for pair in PAIRS if pair[0].strip()])
    texts = requests("loglikelihood_rolling", [(TEXT,), ("Short.",)])
    prompts = requests(
        "generate_until",
        [(context, {"max_gen_toks": 9, "until": ["e"]}) for context, _ in PAIRS[:2]],
    )
    for (a, a_greedy), (b, b_greedy) in zip(
        ours.loglikelihood(pairs), theirs.loglikelihood(pairs, disable_tqdm=True), strict=True
    ):
        assert a == pytest.approx(b, abs=1e-3) and a_greedy == b_greedy
    np.testing.assert_allclose(
        ours.loglikelihood_rolling(texts),
        theirs.loglikelihood_rolling(texts, disable_tqdm=True),
        atol=1e-3,
    )
    assert ours.generate_until(prompts) == theirs.generate_until(prompts, disable_tqdm=True)


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


def test_tasks_can_be_conversations(directory, task, tmp_path):
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
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
