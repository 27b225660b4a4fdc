import fcntl
import json
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.__main__ import main
from glm5_jax.checkpoint import save_checkpoint
from glm5_jax.commands.results import open_results
from glm5_jax.inference import engine as engine_module
from glm5_jax.inference.generate import Generator
from glm5_jax.inference.request import Sampling
from glm5_jax.model import forward, logits
from glm5_jax.places import Places
from tests.tiny import SHARED, TOKENS, random_model, random_weights, write_published

PROMPTS = [TOKENS[:9], TOKENS[3:5], TOKENS, [5]]
GREEDY = Sampling()


@pytest.fixture(scope="module")
def model():
    return random_model(SHARED)


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory):
    """A native checkpoint."""
    path = tmp_path_factory.mktemp("models") / "native"
    save_checkpoint(path, model)
    return path


@jax.jit
def read(model, tokens, places):
    return logits(model, forward(model, tokens, places).hidden_BTD)[0]


def slowly(model, prompt, count):
    """Greedy continuation that reads everything again for every token."""
    tokens = list(prompt)
    for _ in range(count):
        padded = jnp.array([tokens + [0] * (32 - len(tokens))])
        real = jnp.arange(32)[None] < len(tokens)
        tokens.append(int(jnp.argmax(read(model, padded, Places.padded(real))[len(tokens) - 1])))
    return tokens[len(prompt) :]


def test_greedy_generation_equals_reading_everything_again(model):
    completions = Generator(model).complete(PROMPTS, 6, GREEDY)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        assert completion.tokens == slowly(model, prompt, 6)
        assert completion.finish_reason == "length"


def test_a_prompt_is_continued_the_same_alone_and_in_portions(model, monkeypatch):
    together = Generator(model).complete(PROMPTS, 6, GREEDY)
    monkeypatch.setattr(engine_module, "PORTIONS", (8,))
    for prompt, expected in zip(PROMPTS, together, strict=True):
        assert Generator(model).complete([prompt], 6, GREEDY) == [expected]


def test_generation_ends_with_a_stop_token(model):
    whole = Generator(model).complete(PROMPTS, 8, GREEDY)
    stop = whole[0].tokens[3]
    stopped = Generator(model, stop=frozenset([stop])).complete(PROMPTS, 8, GREEDY)
    for before, after in zip(whole, stopped, strict=True):
        if stop in before.tokens:
            end = before.tokens.index(stop) + 1
            assert after == (before.tokens[:end], "stop")
        else:
            assert after == before


def test_a_seed_repeats_a_text_and_batches_do_not_change_it(model):
    warm = Sampling(temperature=1.0, seed=3)
    together = Generator(model).complete(PROMPTS, 8, warm)
    assert Generator(model).complete(PROMPTS, 8, warm) == together
    assert Generator(model).complete(PROMPTS[2:], 8, warm, first_number=2) == together[2:]
    assert Generator(model).complete(PROMPTS, 8, Sampling(temperature=1.0, seed=4)) != together


def test_ids_that_pad_the_vocabulary_are_not_generated(model):
    completions = Generator(model, num_tokens=20).complete(PROMPTS, 8, Sampling(temperature=5.0))
    assert all(max(completion.tokens) < 20 for completion in completions)


def run(capsys, *arguments):
    status = main(["generate", *map(str, arguments)])
    return status, capsys.readouterr()


def test_the_command_prints_an_object_per_prompt(directory, model, capsys, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_tokens": p}) + "\n" for p in PROMPTS))
    options = ("--max-new-tokens", 5, "--json", "--slots", 3, "--draft-tokens", 1)
    status, output = run(capsys, "--model", directory, "--prompts", prompts, *options)
    assert status == 0
    records = [json.loads(line) for line in output.out.splitlines()]
    # transformers' eos token of the config is 1
    expected = Generator(model, stop=frozenset([1])).complete(PROMPTS, 5, GREEDY)
    for index, (prompt, completion) in enumerate(zip(PROMPTS, expected, strict=True)):
        work = records[index].pop("work")
        assert work["drafted_tokens"] == work["main_steps"] >= 5 - work["accepted_tokens"]
        assert records[index] == {
            "index": index,
            "prompt_tokens": prompt,
            "tokens": completion.tokens,
            "text": None,
            "finish_reason": completion.finish_reason,
        }


def test_native_and_published_directories_generate_the_same(directory, capsys, tmp_path):
    published = write_published(tmp_path / "published", SHARED, random_weights(SHARED), 2)
    options = ("--prompt-tokens", "7,17,41", "--max-new-tokens", 6)
    outputs = [run(capsys, "--model", path, *options)[1].out for path in (directory, published)]
    assert outputs[0] == outputs[1] and outputs[0].count(",") == 5


def test_stop_tokens_come_from_the_generation_config(model, directory, capsys, tmp_path):
    published = write_published(tmp_path / "published", SHARED, random_weights(SHARED))
    options = ("--prompt-tokens", "7,17,41", "--max-new-tokens", 6, "--json")
    tokens = json.loads(run(capsys, "--model", published, *options)[1].out)["tokens"]
    (published / "generation_config.json").write_text(json.dumps({"eos_token_id": tokens[2]}))
    record = json.loads(run(capsys, "--model", published, *options)[1].out)
    assert record["tokens"] == tokens[: tokens.index(tokens[2]) + 1]
    assert record["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--prompt-tokens", ""], "--prompt-tokens is empty"),
        (["--prompt-tokens", "5,97"], "token 97 is outside the vocabulary"),
        (["--prompt-tokens=-1,5"], "token -1 is outside the vocabulary"),
        (["--prompt-tokens", "5,7", "--context", "6"], "needs a context of 7, expected at most 6"),
        (["--prompt-tokens", ",".join(["5"] * 252)], "expected at most 256"),
        (["--prompt-tokens", "5", "--context", "257"], "--context is 257, expected at most"),
        (["--prompt", "text"], "has no tokenizer.json"),
        (["--prompt-tokens", "5", "--stop", "x"], "has no tokenizer.json"),
        (["--prompt-tokens", "5", "--top-p", "0"], "top_p is 0.0, expected a number above 0"),
        (["--prompt-tokens", "5", "--out", "/dev/null"], "/dev/null: is no regular file"),
        (["--prompt-tokens", "5", "--min-p", "2"], "min_p is 2.0, expected a number from 0 to 1"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl: No such file"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_one_line(directory, capsys, options, named):
    status, output = run(capsys, "--model", directory, "--max-new-tokens", 5, *options)
    assert status == 2 and output.out == ""
    assert output.err.startswith("glm5: error: ") and output.err.count("\n") == 1
    assert named in output.err


@pytest.mark.parametrize(
    "line",
    ["", "[]", "{", '{"text": "x"}', '{"prompt": 3}', '{"prompt_tokens": ["a"]}', '{"messages": 1}']
    + ['{"prompt": "x", "prompt_tokens": [1]}', '{"prompt_tokens": [1.5]}']
    + ['{"prompt_tokens": []}', '{"prompt_tokens": [97]}'],
)
def test_a_senseless_line_of_prompts_is_named(directory, capsys, tmp_path, line):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt_tokens": [5]}\n' + line + "\n")
    status, output = run(capsys, "--model", directory, "--prompts", prompts, "--max-new-tokens", 5)
    assert status == 2 and "prompts.jsonl, line 2" in output.err


@pytest.mark.parametrize(
    "options",
    [
        ["--max-new-tokens", "0"],
        ["--max-new-tokens", "x"],
        ["--max-new-tokens", "5", "--temperature", "-1"],
        ["--max-new-tokens", "5", "--temperature", "nan"],
        ["--max-new-tokens", "5", "--seed", str(2**32)],
        ["--max-new-tokens", "5", "--dtype", "int8"],
        ["--max-new-tokens", "5", "--top-k", "-1"],
        ["--max-new-tokens", "5", "--top-p", "x"],
        ["--max-new-tokens", "5", "--slots", "0"],
        ["--max-new-tokens", "5", "--draft-tokens", "-1"],
        ["--max-new-tokens", "5", "--prompt", "both"],
    ],
)
def test_senseless_options_are_one_line(directory, capsys, options):
    with pytest.raises(SystemExit) as caught:
        main(["generate", "--model", str(directory), "--prompt-tokens", "5", *options])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_prompts_of_tokens_need_no_tokenizer(directory, capsys, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(directory, model)
    (model / "tokenizer.json").write_text("damaged")
    options = ("--prompt-tokens", "7,17,41", "--max-new-tokens", 3, "--json")
    status, output = run(capsys, "--model", model, *options)
    assert status == 0 and json.loads(output.out)["text"] is None
    assert "tokens are not shown as text" in output.err


def test_lines_end_at_newlines_only(directory, capsys, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt_tokens": [5], "id": "a\u2028b\x85"}\r\n{"prompt_tokens": [7]}')
    options = ("--prompts", prompts, "--max-new-tokens", 2, "--json")
    status, output = run(capsys, "--model", directory, *options)
    assert status == 0 and len(output.out.splitlines()) == 2
    _, output = run(capsys, "--model", directory, *options[:-1])
    assert output.out.splitlines()[::2] == ["--- prompt 1", "--- prompt 2"]


def test_a_run_that_ended_early_is_continued(directory, capsys, tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_tokens": p}) + "\n" for p in PROMPTS))
    options = ("--prompts", prompts, "--out", out, "--max-new-tokens", 5, "--temperature", 1)
    status, output = run(capsys, "--model", directory, *options)
    assert status == 0 and f"{out}: 4 prompts, 0 before" in output.out
    whole = {json.loads(line)["index"]: line for line in out.read_text().splitlines()}
    count = sum(len(json.loads(line)["tokens"]) for line in whole.values())
    assert f", {count} new tokens" in output.out
    lines = out.read_text().splitlines(keepends=True)
    out.write_text(lines[2] + lines[0] + lines[1][:30])  # as if killed while it wrote
    status, output = run(capsys, "--model", directory, *options)
    assert status == 0 and f"{out}: 2 prompts, 2 before" in output.out
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(record["index"] for record in again) == [0, 1, 2, 3]
    for record in again:
        expected = json.loads(whole[record["index"]])
        assert record["tokens"] == expected["tokens"] and record["run"] == expected["run"]
    assert run(capsys, "--model", directory, *options)[0] == 0
    before = out.read_text()
    status, output = run(capsys, "--model", directory, *options, "--seed", 1)
    assert status == 2 and "line 1: run is" in output.err and out.read_text() == before
    with out.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        status, output = run(capsys, "--model", directory, *options)
        assert status == 2 and "another run writes to it" in output.err
    out.write_text('{"prompt": "the only copy"}')  # no line has ended
    status, output = run(capsys, "--model", directory, *options)
    assert status == 2 and "expected a result of glm5 generate" in output.err
    assert out.read_text() == '{"prompt": "the only copy"}'
    out.write_text(before + before.splitlines(keepends=True)[0])
    status, output = run(capsys, "--model", directory, *options)
    assert status == 2 and "line 5: index is" in output.err


def test_a_disk_that_is_full_is_named_and_costs_no_result(tmp_path):
    out = tmp_path / "out.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_results(out, "a run", 9) as results:
        results.add(3, {"run": "a run"})
        resource.setrlimit(resource.RLIMIT_FSIZE, (out.stat().st_size + 10, before[1]))
        try:
            with pytest.raises(OSError) as caught:
                results.add(4, {"run": "a run"})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(out)
    with open_results(out, "a run", 9) as results:
        assert results.done == {3}


def test_a_stop_text_ends_a_continuation_and_is_not_shown(capsys, tmp_path):
    directory = write_published(tmp_path / "model", SHARED, random_weights(SHARED))
    letters = {chr(33 + token): token for token in range(94)}
    tokenizer = {"type": "WordLevel", "vocab": letters, "unk_token": "!"}
    split = {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False}
    content = {"version": "1.0", "model": tokenizer, "pre_tokenizer": split, "added_tokens": []}
    content |= {key: None for key in ("truncation", "padding", "normalizer", "post_processor")}
    content["decoder"] = {"type": "Fuse"}
    (directory / "tokenizer.json").write_text(json.dumps(content))
    options = ("--model", directory, "--prompt", "hello", "--max-new-tokens", 12)
    text = run(capsys, *options)[1].out.removesuffix("\n")
    assert len(text) == 12
    stop = text[5:7]
    expected = text[: text.index(stop)] + "\n"
    assert run(capsys, *options, "--stop", stop)[1].out == expected
    record = json.loads(run(capsys, *options, "--stop", stop, "--stop", "@@", "--json")[1].out)
    assert (record["text"], record["finish_reason"]) == (expected[:-1], "stop")


def test_bfloat16_generates_too(directory, capsys):
    options = ("--prompt-tokens", "7,17,41", "--max-new-tokens", 6, "--dtype", "bfloat16")
    status, output = run(capsys, "--model", directory, *options)
    assert status == 0
    assert np.fromstring(output.out, sep=",").shape == (6,)


def test_without_the_mtp_layer_that_transformers_drops_nothing_is_drafted(capsys, tmp_path):
    weights = random_weights(SHARED)
    kept = {name: w for name, w in weights.items() if not name.startswith("model.layers.7.")}
    directory = write_published(tmp_path / "model", SHARED, kept)
    options = ("--prompt-tokens", "7,17,41", "--max-new-tokens", 3, "--json")
    status, output = run(capsys, "--model", directory, *options)
    assert status == 0, output.err
    assert len(json.loads(output.out)["tokens"]) == 3
    status, output = run(capsys, "--model", directory, *options, "--draft-tokens", 1)
    assert status == 2 and "the model has no MTP layer" in output.err
