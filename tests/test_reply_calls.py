import json

import pytest

from glm5_jax.errors import InputError
from glm5_jax.inference.reply import (
    CallStart,
    Content,
    ReplyParser,
    starts_thinking,
)
from tests.replies import GLM_4_5, TOOLS, Reply, call, parsed, tool

PARIS = ("weather", '{"city": "Paris", "days": 2}')


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("why</think>so", Reply("why", "so")),
        ("why\n</think>\n\n so\n", Reply("why\n", " so\n")),
        ("</think>so", Reply("", "so")),
        ("<think>why</think>so", Reply("<think>why", "so")),
        ("only </thin", Reply("only </thin")),
        ("a</think>b</think>c<think>d", Reply("a", "b</think>c<think>d")),
        ("a<tool_call>now</tool_call></think>b", Reply("a<tool_call>now</tool_call>", "b")),
        ("a</think>" + call("now"), Reply("a", "", [("now", "{}")])),
    ],
)
def test_reasoning_ends_at_its_tag(answer, expected):
    assert parsed([answer], thinking=True) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("so", Reply("", "so")),
        ("\nso\n", Reply("", "so\n")),
        ("\n<think>why</think>\nso", Reply("why", "so")),
        ("so <think>why</think>", Reply("", "so <think>why</think>")),
        ("", Reply()),
        (" ", Reply("", " ")),
    ],
)
def test_an_answer_without_reasoning_is_content(answer, expected):
    assert parsed([answer]) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (call("weather", city="Paris", days=2), Reply("", "", [PARIS])),
        (GLM_4_5, Reply("", "Let me look.", [PARIS, ("now", "{}")])),
        ("a " + call("now") + "\nb", Reply("", "a\nb", [("now", "{}")])),
        (call("now") + "\n\nb\n", Reply("", "b\n", [("now", "{}")])),
        (call("weather_map"), Reply("", "", [("weather_map", "{}")])),
    ],
)
def test_calls_are_taken_out_of_the_content(answer, expected):
    assert parsed([answer]) == expected


NOT_CALLS = [
    "Write <tool_call> before the name.",
    "a\n <tool_call>",
    "x < y <tool",
    call("unknown", city="Paris"),
    call("weat"),
    call("now and"),
    "<tool_call>now",
    "<tool_call>weather<arg_key>city</arg_key><arg_value>Par",
    "<tool_call>weather<arg_key>city</arg_key><arg_value>Paris</arg_value>",
    "<tool_call>weather<arg_key>city",
    "<tool_call>weather<arg_value>Paris</arg_value></tool_call>",
    "<tool_call>weather<arg_key>city</arg_key>Paris</tool_call>",
    "<tool_call>weather<arg_key>city</arg_key></tool_call>\n",
    "<tool_call>weather<arg_key>city</arg_key><arg_value>Paris</arg_value>, ",
    "<tool_call>weather"
    + 2 * "<arg_key>city</arg_key><arg_value>Paris</arg_value>"
    + "</tool_call>",
]


@pytest.mark.parametrize("answer", NOT_CALLS)
def test_what_only_looks_like_a_call_is_content(answer):
    assert parsed([answer]) == Reply("", answer)


@pytest.mark.parametrize("answer", [a for a in NOT_CALLS if a.startswith("<tool_call>")])
def test_a_call_after_a_malformed_one_is_found(answer):
    assert parsed([answer + call("now")]).calls[-1:] == [("now", "{}")]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("a" + " " * 100 + call("now"), Reply("", "a" + " " * 36, [("now", "{}")])),
        (" " * 100 + "<think>b</think>", Reply("", " " * 100 + "<think>b</think>")),
        ("<tool_call>now" + " " * 100, Reply("", "<tool_call>now" + " " * 100)),
        ("<tool_call>now" + " " * 65 + "</tool_call>", None),
        (call("weather", city="x").replace("<arg_v", " " * 65 + "<arg_v"), None),
    ],
)
def test_no_more_whitespace_is_held_back_than_may_stand_between_parts(answer, expected):
    assert parsed([answer]) == parsed(answer) == (expected or Reply("", answer))
    assert ReplyParser(False, TOOLS).push(" " * 100) == [Content(" " * 36)]


def test_calls_are_content_where_no_tools_are_offered():
    assert parsed([GLM_4_5], tools=()) == Reply("", GLM_4_5.lstrip())


def test_every_call_has_an_id_of_its_own():
    parsers = [ReplyParser(False, TOOLS) for _ in range(2)]
    pieces = [piece for parser in parsers for piece in parser.push(call("now") * 3)]
    ids = [piece.id for piece in pieces if isinstance(piece, CallStart)]
    assert len(ids) == len(set(ids)) == 6


@pytest.mark.parametrize(
    ("schema", "text", "expected"),
    [
        ({"type": "string"}, "5", "5"),
        ({"type": "string"}, ' "x"\n', ' "x"\n'),
        ({"type": "string"}, "null", "null"),
        ({"type": "integer"}, " 5\n", 5),
        ({"type": "integer"}, "five", "five"),
        ({"type": "object"}, '{"a": [1, 2]}', {"a": [1, 2]}),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "5", "5"),
        ({"type": ["string", "number"]}, "5", 5),
        ({"type": ["string", "integer"]}, "5.5", "5.5"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "true", "true"),
        ({"oneOf": [{"type": "string"}, {"type": "boolean"}]}, "true", True),
        ({"oneOf": [{"type": "string"}, {"type": "boolean"}]}, "5", "5"),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"enum": [1, 2]}, "1", 1),
        ({}, "5", 5),
        (True, "[]", []),
        (None, "true", True),
        (None, "", ""),
        (None, '"x"', '"x"'),
        (None, '1, "b": 2', '1, "b": 2'),
        (None, "NaN", "NaN"),
        (None, '{"a": 1, "a": 2}', '{"a": 1, "a": 2}'),
        (None, "[" * 100_000, "[" * 100_000),
    ],
)
def test_the_schema_tells_strings_from_json(schema, text, expected):
    reply = parsed([call("f", x=text)], tools=[tool("f", x=schema)])
    ((_, arguments),) = reply.calls
    assert json.loads(arguments) == {"x": expected}
    assert type(json.loads(arguments)["x"]) is type(expected)


def test_a_number_is_not_rounded():
    number = "12345678901234567890.12345678901234567890"
    assert parsed([call("now", x=number)]).calls == [("now", f'{{"x": {number}}}')]


def test_a_value_may_contain_tags():
    code = "'</arg_value>' + </tool_call><tool_call>now</tool_call> </arg_value>!"
    reply = parsed([call("weather", city=code) + call("now")])
    assert [name for name, _ in reply.calls] == ["weather", "now"]
    assert json.loads(reply.calls[0][1]) == {"city": code}


@pytest.mark.parametrize(
    ("prompt", "thinking"),
    [
        ("[gMASK]<sop><|user|>Hi<|assistant|><think>", True),
        ("<|user|>Hi<|assistant|>\n<think>\n", True),
        ("<|user|>Hi<|assistant|><think></think>", False),
        ("<|user|>Hi<|assistant|></think>", False),
        ("<|user|>What is <think>?<|assistant|>", False),
    ],
)
def test_the_prompt_tells_whether_the_answer_begins_in_the_reasoning(prompt, thinking):
    assert starts_thinking(prompt) is thinking


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"type": "function"}, r"tools\[0\]\.function is None"),
        ({"function": {"name": 3}}, r"tools\[0\]\.function\.name is 3"),
        ({"function": {"name": "f", "parameters": [1]}}, r"function\.parameters is \[1\]"),
        ({"function": {"name": "f", "parameters": {"properties": 1}}}, "parameters is {"),
    ],
)
def test_a_malformed_tool_is_named(wrong, named):
    with pytest.raises(InputError, match=named):
        ReplyParser(False, [wrong])
