import json

import pytest

from glm5_jax.inference.continuation import Continuation
from glm5_jax.inference.reply import ReplyParser, starts_thinking
from glm5_jax.inference.request import Event, Likelihood
from glm5_jax.inference.tokenizer import Tokenizer
from glm5_jax.server.chat import ChatForm
from tests.serving import NAME, STOP, direct, serve, text_of, write_model

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def client(directory):
    with serve(directory) as served, served.client() as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(directory):
    return Tokenizer(directory)


@pytest.fixture(scope="module")
def generate(tokenizer):
    return direct(tokenizer)


def ask_chat(client, **options):
    defaults = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}], "seed": 3}
    return client.chat.completions.create(**(defaults | {"max_tokens": 12} | options))


def test_chat_log_probabilities_carry_bytes(client, tokenizer, generate):
    answer = ask_chat(client, logprobs=True, top_logprobs=2)
    prompt = tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    events = [e for e in generate(prompt, alternatives=2, seed=3) if e.token not in STOP]
    content = answer.choices[0].logprobs.content
    for entry, event in zip(content, events, strict=True):
        assert (entry.token, entry.bytes) == tokenizer.token_text(event.token)
        assert entry.logprob == pytest.approx(event.likelihood.logprob)
        best = [(top.bytes, top.logprob) for top in entry.top_logprobs]
        expected = [(tokenizer.token_text(t)[1], lp) for t, lp in event.likelihood.alternatives]
        assert [each[0] for each in best] == [each[0] for each in expected]
        assert [each[1] for each in best] == pytest.approx([each[1] for each in expected])
    assert ask_chat(client).choices[0].logprobs is None


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("options", [{}, {"n": 2, "logprobs": True}, {"stop": ["o", "e"]}], ids=str)
def test_a_streamed_turn_joins_to_the_whole(client, options, thinking):
    extra = {"extra_body": {"chat_template_kwargs": {"enable_thinking": thinking}}}
    whole = ask_chat(client, max_tokens=60, **options, **extra)
    with client.chat.completions.stream(
        model=NAME,
        messages=[{"role": "user", "content": "Hi"}],
        seed=3,
        max_tokens=60,
        **options,
        **extra,
    ) as stream:
        chunks = [event.chunk for event in stream if event.type == "chunk"]
    for expected in whole.choices:
        said = [c for chunk in chunks for c in chunk.choices if c.index == expected.index]
        assert said[0].delta.role == "assistant"
        content = "".join(choice.delta.content or "" for choice in said)
        thoughts = "".join((c.delta.model_extra or {}).get("reasoning_content", "") for c in said)
        assert content == expected.message.content
        assert thoughts == expected.message.model_extra.get("reasoning_content", "")
        assert said[-1].finish_reason == expected.finish_reason
        assert bool(thoughts) == thinking
        if expected.logprobs is not None:
            entries = [e for choice in said if choice.logprobs for e in choice.logprobs.content]
            assert entries == expected.logprobs.content


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_conversation_reaches_the_model_by_its_template(client, tokenizer, generate, role):
    messages = [
        {"role": role, "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
        {"role": "assistant", "content": "Yes?", "reasoning_content": "Hm."},
        {"role": "user", "content": "é"},
    ]
    answer = ask_chat(client, messages=messages, reasoning_effort="low")
    rendered = (
        "<|user|>system: Be brief.<|user|>user: Hi<|user|>assistant: Yes?<|user|>user: é"
        "<|assistant|>low"
    )
    events = generate(rendered, seed=3)
    assert answer.choices[0].message.content == text_of(events, tokenizer).lstrip("\n")
    assert answer.usage.prompt_tokens == len(tokenizer.encode(rendered, special=False))


def test_tools_reach_the_template_unless_none_are_to_be_called(client, tokenizer):
    plain = "<|user|>user: Hi<|assistant|>"
    offered = f"<|user|>user: Hi{json.dumps([TOOL])}<|assistant|>"
    for choice, rendered in (("auto", offered), ("none", plain)):
        answer = ask_chat(client, tools=[TOOL], tool_choice=choice)
        assert answer.usage.prompt_tokens == len(tokenizer.encode(rendered, special=False))


def test_an_answer_and_its_calls_can_be_sent_back(client):
    first = ask_chat(client, extra_body={"chat_template_kwargs": {"enable_thinking": True}})
    call = {"id": "call_1", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        {"role": "user", "content": "Hi"},
        first.choices[0].message,
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": None, "tool_calls": [call | {"type": "function"}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    assert ask_chat(client, messages=messages).choices[0].finish_reason == "length"


CALLS = (
    "Two calls.</think>\n\nLet me look.\n<tool_call>weather<arg_key>city</arg_key>"
    "<arg_value>Oslo</arg_value></tool_call>\n<tool_call>weather\n<arg_key>city</arg_key>"
    "<arg_value>北京</arg_value></tool_call>"
)


def said(tokenizer, text, last, *, tools=(TOOL,), parallel=True, scored=False):
    """What a stream says of a turn with the given text."""
    tokens = tokenizer.encode(text, special=False)
    likelihood = Likelihood(-1.0, ()) if scored else None
    events = [Event(1, token, likelihood, None, None) for token in tokens]
    events[-1] = events[-1]._replace(finish_reason=last)
    parser = ReplyParser(starts_thinking("<|assistant|><think>"), tools)
    form = ChatForm(tokenizer, [parser], scored=scored, parallel=parallel)
    continuation = Continuation(lambda t: tokenizer.decode(t, keep=form.keep), [])
    choices = form.begin(0)
    for event in events:
        choices += form.add(0, continuation.push(event))
        if choices[-1]["finish_reason"] is not None:
            break
    return choices, form.join(choices)


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize(("last", "reason"), [("stop", "tool_calls"), ("length", "length")])
def test_calls_are_told_apart_from_reasoning_and_content(tokenizer, last, reason, scored):
    # A token that means the end has no text of its own.
    choices, turn = said(tokenizer, CALLS + "\n" * (last == "stop"), last, scored=scored)
    message = turn["message"]
    assert message["reasoning_content"] == "Two calls."
    assert message["content"] == "Let me look."
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "weather", "arguments": '{"city": "Oslo"}'},
        {"name": "weather", "arguments": '{"city": "北京"}'},
    ]
    assert turn["finish_reason"] == reason
    deltas = [d for choice in choices for d in choice["delta"].get("tool_calls", [])]
    assert [d["index"] for d in deltas] == [0, 0, 1, 1]
    assert [d["id"] for d in deltas[::2]] == [call["id"] for call in message["tool_calls"]]
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    if scored:
        shown = b"".join(bytes(entry["bytes"]) for entry in turn["logprobs"]["content"])
        assert shown.decode().rstrip() == CALLS


def test_a_turn_ends_with_its_first_call_where_one_is_wanted(tokenizer):
    _, turn = said(tokenizer, CALLS + "\n", "stop", parallel=False)
    [call] = turn["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"city": "Oslo"}
    assert turn["finish_reason"] == "tool_calls"


def test_without_tools_calls_are_content(tokenizer):
    _, turn = said(tokenizer, CALLS + "\n", "stop", tools=())
    assert turn["message"]["content"] == CALLS.partition("</think>")[2].strip("\n")
    assert "tool_calls" not in turn["message"] and turn["finish_reason"] == "stop"
