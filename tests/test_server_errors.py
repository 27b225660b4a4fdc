import json

import httpx2
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glm5_jax.server.limits import Limits
from glm5_jax.server.protocol import ChatBody, CompletionBody
from tests.serving import NAME, assert_refused, direct, post, serve, text_of, until, write_model

COMPLETION = {"model": NAME, "prompt": "a", "max_tokens": 4, "seed": 3}
CHAT = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
LIMITS = Limits(body_bytes=100_000, messages=5, prompt_tokens=300, choices=4)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def served(directory):
    with serve(directory, limits=LIMITS, context=512) as served:
        yield served


@pytest.fixture(scope="module")
def expected(served):
    return text_of(direct(served.service.tokenizer)("a", 4, seed=3), served.service.tokenizer)


@pytest.fixture(autouse=True)
def others_are_still_served(served, expected):
    """Whatever a test has sent."""
    yield
    assert post(served, "completions", json=COMPLETION).json()["choices"][0]["text"] == expected
    until(lambda: served.metric("glm5_running") == served.metric("glm5_waiting") == 0)


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "expected a JSON object"),
        (b'"text"', "expected a JSON object"),
        (b'{"model": "caf\xe9"}', "not valid JSON"),
        (b'{"model": "\\ud800"}', "not valid Unicode"),
        (b'{"model": "x", "model": "y"}', "stands twice"),
        (b'{"temperature": NaN}', "not finite"),
        (b'{"temperature": Infinity}', "not finite"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a": ' + b"[" * 40_000, "not valid JSON"),
        (b'{"model": "x", "a": ' + b"[" * 400 + b"]" * 400 + b"}", "a is no field"),
        (b"{}", "model"),
        (b'{"model": 3}', "model is 3"),
        (b'{"model": null}', "model"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_body_that_makes_no_sense_is_named(served, path, body, named):
    assert_refused(post(served, path, content=body), 400, named)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"promt": "x"}, "promt is no field"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": "1"}, "temperature is '1'"),
        ({"temperature": True}, "temperature is True"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": 2}, "min_p is 2"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"presence_penalty": 3}, "presence_penalty is 3"),
        ({"frequency_penalty": -3}, "frequency_penalty is -3"),
        ({"n": 0}, "n is 0"),
        ({"n": 5}, "n is 5, expected at most 4"),
        ({"n": 10**30}, "n is 1000"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": -5}, "max_tokens is -5"),
        ({"max_tokens": 1.5}, "max_tokens is 1.5"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": [3]}, "stop.0 is 3"),
        ({"stop": 3}, "stop is 3"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"320": 1}}, "320"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"stream": "yes"}, "stream is 'yes'"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage is no field"),
        ({"user": 3}, "user is 3"),
    ],
    ids=str,
)
def test_a_wrong_field_of_either_kind_is_named(served, fields, named):
    for path, body in (("completions", COMPLETION), ("chat/completions", CHAT)):
        assert_refused(post(served, path, json=body | fields), 400, named)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "is empty"),
        ({"prompt": ""}, "is empty"),
        ({"prompt": ["a", [5]]}, None),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [[[5]]]}, "prompt"),
        ({"prompt": [-1]}, "token -1 is outside the vocabulary"),
        ({"prompt": [320]}, "token 320 is outside the vocabulary"),
        ({"prompt": [10**30], "echo": True}, "outside the vocabulary"),
        ({"prompt": [[5]] * 80}, "80 continuations"),
        ({"prompt": "a" * 301}, "301 tokens, expected at most 300"),
        ({"prompt": "a" * 200, "max_tokens": 313}, "context of 513, expected at most 512"),
        ({"prompt": "a" * 20, "max_tokens": 10**15}, "expected at most 512"),
        ({"logprobs": 21}, "logprobs is 21"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"logprobs": True}, "logprobs is True"),
        ({"logprobs": 1, "echo": True}, "leave out echo"),
        ({"suffix": "x"}, "suffix is no field"),
        ({"messages": []}, "messages is no field"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_completion_is_named(served, fields, named):
    response = post(served, "completions", json=COMPLETION | fields)
    if named is None:
        assert response.status_code == 200
    else:
        assert_refused(response, 400, named)


def user(content):
    return {"messages": [{"role": "user", "content": content}]}


def tool(**fields):
    return {"tools": [{"type": "function", "function": {"name": "f"} | fields}]}


def assistant(**fields):
    return {"messages": [*CHAT["messages"], {"role": "assistant"} | fields]}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages is 'Hi'"),
        ({"messages": ["Hi"]}, "messages.0 is 'Hi'"),
        ({"messages": CHAT["messages"] * 6}, "6 messages, expected at most 5"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role is 'robot'"),
        (
            {"messages": [{"role": "user", "content": "x", "mood": 1}]},
            "messages.0.mood is no field",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, "tool_call_id"),
        (user(None), "messages[0].content"),
        (user(3), "messages[0].content is 3"),
        (user([{"type": "image_url", "image_url": {"url": "x"}}]), "image_url"),
        (user([{"type": "text", "text": 3}]), "text is 3"),
        (user("a" * 301), "expected at most 300"),
        ({**user("Hi"), "max_tokens": 510}, "expected at most 512"),
        ({"max_completion_tokens": 4}, "expected one of them"),
        ({"max_tokens": None, "max_completion_tokens": 0}, "max_completion_tokens is 0"),
        (assistant(content=None), "messages[1].content"),
        (assistant(tool_calls=[{"id": "x", "function": {"name": "f"}}]), "arguments"),
        (
            assistant(tool_calls=[{"id": "x", "function": {"name": "f", "arguments": "[]"}}]),
            "arguments",
        ),
        ({"top_logprobs": 2}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs is 21"),
        ({"logprobs": 2}, "logprobs is 2"),
        ({"tool_choice": "required"}, "tool_choice is 'required'"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tools": "f"}, "tools"),
        ({"tools": [{"type": "retrieval"}]}, "tools.0.type"),
        (tool(name="no spaces"), "tools.0.function.name is 'no spaces'"),
        (tool(parameters=[]), "tools.0.function.parameters"),
        (tool(parameters={"type": "array"}), "parameters"),
        (tool(parameters={"properties": [1]}), "parameters"),
        ({"tools": tool()["tools"] * 2}, "the same name"),
        ({"response_format": {"type": "json_object"}}, "response_format.type is 'json_object'"),
        ({"chat_template_kwargs": {"messages": []}}, "messages"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"store": True}, "store is True"),
        ({"functions": []}, "functions is no field"),
        ({"prompt": "x"}, "prompt is no field"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_wrong_conversation_is_named(served, fields, named):
    assert_refused(post(served, "chat/completions", json=CHAT | fields), 400, named)


def test_errors_have_codes_and_parameters(served):
    for fields, code, param in (
        ({"prompt": "a" * 200, "max_tokens": 400}, "context_length_exceeded", None),
        ({"mood": 1}, "unknown_field", "mood"),
        ({"temperature": -1}, "invalid_value", "temperature"),
        ({"logit_bias": {"5": 101}}, "invalid_value", "logit_bias"),
        ({"stop": [3]}, "invalid_value", "stop.0"),
        ({"logprobs": 1, "echo": True}, "unsupported", "logprobs"),
    ):
        error = post(served, "completions", json=COMPLETION | fields).json()["error"]
        assert (error["code"], error["param"]) == (code, param)


def test_unknown_models_and_paths_are_not_found(served):
    with served.client() as client:
        with pytest.raises(openai.NotFoundError, match="model 'gpt' is not served"):
            client.models.retrieve("gpt")
        with pytest.raises(openai.NotFoundError) as caught:
            client.completions.create(model="gpt", prompt="a")
        assert caught.value.code == "model_not_found" and caught.value.param == "model"
    assert_refused(httpx2.get(f"{served.url}/v2/models"), 404, "/v2/models")
    assert_refused(httpx2.delete(f"{served.url}/v1/models"), 405, "DELETE")
    assert_refused(httpx2.get(f"{served.url}/v1/completions"), 405, "GET")


def test_a_stream_that_cannot_begin_is_an_error_with_its_status(served):
    with served.client() as client, pytest.raises(openai.BadRequestError, match="is empty"):
        client.completions.create(**COMPLETION | {"prompt": ""}, stream=True)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=[]), max_size=8)
    | st.sampled_from(["user", "assistant", "tool", "system", "text", "function", NAME, "auto"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "name", "5"]), inner)
    ),
    max_leaves=6,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize(
    ("path", "valid", "kind"),
    [("completions", COMPLETION, CompletionBody), ("chat/completions", CHAT, ChatBody)],
)
def test_no_body_breaks_the_server(served, path, valid, kind, data):
    fields = data.draw(
        st.dictionaries(st.sampled_from(sorted(kind.model_fields)), JSON, max_size=3)
    )
    body = json.dumps(valid | fields | {"max_tokens": 4})
    response = post(served, path, content=body.encode())
    assert response.status_code in (200, 400, 404), (body, response.text)
    if response.status_code != 200:
        error = response.json()["error"]
        assert error["message"] and "\n" not in error["message"]
