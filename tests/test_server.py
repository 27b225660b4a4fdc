import json

import httpx2
import pytest

from glm5_jax.errors import InputError
from glm5_jax.inference.generation_config import usual_sampling
from glm5_jax.inference.tokenizer import Tokenizer
from tests.serving import ENDLESS, NAME, STOP, direct, events_of, serve, text_of, write_model

PROMPTS = ["def f(x):", "北京 is", "a"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def served(directory):
    with serve(directory) as served:
        yield served


@pytest.fixture(scope="module")
def client(served):
    with served.client() as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(directory):
    return Tokenizer(directory)


@pytest.fixture(scope="module")
def generate(tokenizer):
    return direct(tokenizer)


def test_the_model_is_listed(client):
    [model] = client.models.list().data
    assert (model.id, model.object) == (NAME, "model")
    assert client.models.retrieve(NAME) == model


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0},
        {"seed": 5},
        {"seed": 6, "temperature": 0.5, "top_p": 0.9, "frequency_penalty": 1.5},
        {"seed": 7, "presence_penalty": -2, "logit_bias": {"65": 20, "66": 19.5}},
    ],
)
def test_a_completion_is_what_the_engine_gives(client, tokenizer, generate, prompt, sampling):
    answer = client.completions.create(model=NAME, prompt=prompt, max_tokens=12, **sampling)
    given = sampling | {
        "logit_bias": {int(k): v for k, v in sampling.get("logit_bias", {}).items()}
    }
    events = generate(prompt, **given)
    [choice] = answer.choices
    assert choice.text == text_of(events, tokenizer)
    assert choice.finish_reason == events[-1].finish_reason
    prompt_tokens = len(tokenizer.encode(prompt))
    assert answer.usage.prompt_tokens == prompt_tokens
    assert answer.usage.completion_tokens == len(events)
    assert answer.usage.total_tokens == prompt_tokens + len(events)
    assert (answer.object, answer.model) == ("text_completion", NAME)


def test_fields_beyond_openai_change_the_text(client, tokenizer, generate):
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.3}
    answer = client.completions.create(model=NAME, prompt="a", seed=9, extra_body=extra)
    assert answer.choices[0].text == text_of(generate("a", 16, seed=9, **extra), tokenizer)


def test_prompts_may_be_texts_and_tokens(client, tokenizer):
    tokens = [tokenizer.encode(prompt) for prompt in PROMPTS]
    options = {"model": NAME, "seed": 3, "max_tokens": 8}
    alone = [client.completions.create(prompt=prompt, **options) for prompt in PROMPTS]
    texts = [answer.choices[0].text for answer in alone]
    for prompts, expected in [(PROMPTS, texts), (tokens, texts), (tokens[0], texts[:1])]:
        answer = client.completions.create(prompt=prompts, **options)
        assert [choice.text for choice in answer.choices] == expected
        assert [choice.index for choice in answer.choices] == list(range(len(expected)))


def test_choices_of_one_seed_differ_and_come_back(client, tokenizer, generate):
    options = {"model": NAME, "prompt": PROMPTS[:2], "seed": 3, "n": 3, "max_tokens": 8}
    answer = client.completions.create(**options)
    expected = [
        text_of(generate(prompt, 8, number=number, seed=3), tokenizer)
        for prompt in PROMPTS[:2]
        for number in range(3)
    ]
    assert [choice.text for choice in answer.choices] == expected
    assert len(set(expected)) == 6
    assert answer.usage.prompt_tokens == sum(len(tokenizer.encode(p)) for p in PROMPTS[:2])


def test_without_a_seed_texts_differ(client):
    create = client.completions.create
    answers = [create(model=NAME, prompt=["a", "a"], max_tokens=16, n=2) for _ in range(2)]
    assert len({choice.text for answer in answers for choice in answer.choices}) == 8


def test_log_probabilities_are_those_of_the_engine(client, tokenizer, generate):
    options = {"model": NAME, "prompt": "a", "max_tokens": 12, "seed": 3}
    found = client.completions.create(**options, logprobs=3).choices[0].logprobs
    events = [event for event in generate("a", alternatives=3, seed=3) if event.token not in STOP]
    assert found.token_logprobs == pytest.approx([e.likelihood.logprob for e in events])
    content = [bytes(tokenizer.token_text(event.token)[1]) for event in events]
    for text, expected in zip(found.tokens, content, strict=True):
        if text.startswith("bytes:"):
            assert bytes.fromhex(text.removeprefix("bytes:").replace("\\x", "")) == expected
        else:
            assert text.encode() == expected
    for best, event, text in zip(found.top_logprobs, events, found.tokens, strict=True):
        alternatives = [logprob for _, logprob in event.likelihood.alternatives]
        assert sorted(best.values())[-3:] == pytest.approx(sorted(alternatives))
        assert best[text] == pytest.approx(event.likelihood.logprob) and 3 <= len(best) <= 4


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n": 3},
        {"logprobs": 2, "n": 2},
        {"echo": True},
        {"prompt": PROMPTS, "n": 2, "stop": ["e", "1"]},
        {"stop": "\ufffd", "logprobs": 0},
    ],
    ids=str,
)
def test_a_streamed_completion_joins_to_the_whole(served, options):
    body = {"model": NAME, "prompt": "def", "seed": 11, "max_tokens": 40} | options
    whole = httpx2.post(f"{served.url}/v1/completions", json=body).json()
    response = httpx2.post(
        f"{served.url}/v1/completions",
        json=body | {"stream": True, "stream_options": {"include_usage": True}},
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events_of(response.text)
    assert last["choices"] == [] and all(chunk["usage"] is None for chunk in chunks)
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [last["usage"][name] for name in counts] == [whole["usage"][name] for name in counts]
    for expected in whole["choices"]:
        said = [c for chunk in chunks for c in chunk["choices"] if c["index"] == expected["index"]]
        assert "".join(choice["text"] for choice in said) == expected["text"]
        assert all(choice["finish_reason"] is None for choice in said[:-1])
        assert said[-1]["finish_reason"] == expected["finish_reason"] in ("stop", "length")
        if expected["logprobs"] is None:
            assert all(choice["logprobs"] is None for choice in said)
        else:
            for name, values in expected["logprobs"].items():
                joined = [value for choice in said for value in choice["logprobs"][name]]
                assert joined == values and len(values) <= last["usage"]["completion_tokens"]


def test_a_stop_string_and_what_follows_are_not_shown(client, tokenizer, generate):
    events = generate("a", 40, seed=4)
    text = text_of(events, tokenizer)
    stop = next(c for c in text[8:] if c.isprintable() and c != "\ufffd" and c not in text[:8])
    options = {"model": NAME, "prompt": "a", "seed": 4, "max_tokens": 40}
    answer = client.completions.create(**options, stop=["never said", stop], logprobs=0)
    [choice] = answer.choices
    assert choice.text == text[: text.index(stop)] and choice.finish_reason == "stop"
    shown = len(choice.logprobs.tokens)
    assert shown == answer.usage.completion_tokens - 1
    assert tokenizer.decode([event.token for event in events[:shown]]) == choice.text
    # The text of each token begins where it says.
    offsets = choice.logprobs.text_offset
    whole = [(o, t) for o, t in zip(offsets, choice.logprobs.tokens, strict=True) if len(t) == 1]
    assert whole and all(choice.text[offset] == token for offset, token in whole)


def test_the_prompt_is_echoed(client, tokenizer):
    options = {"model": NAME, "seed": 3, "max_tokens": 4, "n": 2}
    for prompt in ("北京 is", tokenizer.encode("北京 is")):
        plain = client.completions.create(prompt=prompt, **options).choices
        echoed = client.completions.create(prompt=prompt, echo=True, **options).choices
        assert [c.text for c in echoed] == ["北京 is" + c.text for c in plain]


def test_an_answer_may_take_all_the_room_there_is(directory, tokenizer):
    prompt = tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    with serve(directory, context=64) as served, served.client() as client:
        options = {"model": NAME, "logit_bias": ENDLESS["logit_bias"]}
        messages = [{"role": "user", "content": "Hi"}]
        answer = client.chat.completions.create(messages=messages, **options)
        assert answer.usage.completion_tokens == 64 - len(prompt)
        assert answer.choices[0].finish_reason == "length"
        answer = client.completions.create(prompt=[5] * 60, **options)
        assert answer.usage.completion_tokens == 4
        assert client.completions.create(prompt="a", **options).usage.completion_tokens == 16


@pytest.mark.parametrize("draft_tokens", [0, 2])
def test_usage_tells_what_was_reused_and_drafted(directory, draft_tokens):
    with serve(directory, draft_tokens=draft_tokens) as served, served.client() as client:
        options = {"model": NAME, "prompt": [5, 6, 7] * 50, "max_tokens": 20, "temperature": 0}
        first = client.completions.create(**options)
        usage = client.completions.create(**options, n=2).usage
        assert first.usage.prompt_tokens_details.cached_tokens == 0
        assert 0 < usage.prompt_tokens_details.cached_tokens <= 150
        details = usage.completion_tokens_details
        tried = details.accepted_prediction_tokens + details.rejected_prediction_tokens
        assert (tried > 0) == (draft_tokens > 0)
        drafted = served.metric("glm5_drafted_tokens_total")
        assert drafted >= tried and (drafted > 0) == (draft_tokens > 0)


def test_metrics_count_what_was_done(directory):
    with serve(directory, slots=4) as served, served.client() as client:
        options = ENDLESS | {"max_tokens": 6}
        client.completions.create(model=NAME, prompt=[5, 6, 7], n=2, **options)
        httpx2.get(f"{served.url}/nowhere")
        requests = 'glm5_http_requests_total{route="%s",status="%s"}'
        assert served.metric(requests % ("/v1/completions", 200)) == 1
        assert served.metric(requests % ("other", 404)) == 1
        assert served.metric("glm5_prompt_tokens_total") == 6
        assert served.metric("glm5_generated_tokens_total") == 12
        assert served.metric("glm5_finished_total") == 2
        assert served.metric("glm5_slots") == 4 and served.metric("glm5_running") == 0
        assert served.metric("glm5_time_to_first_token_seconds_count") == 2
        assert served.metric("glm5_time_per_token_seconds_count") == 2
        assert served.metric("glm5_compilations_total") >= 0


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, (1.0, 1.0)),
        ({}, (1.0, 1.0)),
        ({"temperature": None, "top_p": 0.95}, (1.0, 0.95)),
        ({"temperature": 0, "eos_token_id": 5}, (0, 1.0)),
    ],
)
def test_how_to_sample_comes_from_the_generation_config(tmp_path, config, expected):
    if config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
    usual = usual_sampling(tmp_path)
    assert (usual.temperature, usual.top_p) == expected


@pytest.mark.parametrize("config", ['{"temperature": -1}', '{"top_p": "x"}', '{"top_p": true}'])
def test_a_senseless_generation_config_is_named(tmp_path, config):
    (tmp_path / "generation_config.json").write_text(config)
    with pytest.raises(InputError, match=r"generation_config\.json: (temperature|top_p) is"):
        usual_sampling(tmp_path)
