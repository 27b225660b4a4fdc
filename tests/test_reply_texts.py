"""However an answer is made and cut, nothing is lost or taken for something else."""

import itertools
import json

import jinja2.sandbox
from hypothesis import example, given
from hypothesis import strategies as st

from glm5_jax.inference.reply import (
    TAGS,
    Content,
    Reasoning,
    ReplyParser,
    starts_thinking,
)
from tests.replies import GLM_4_5, TOOLS, call, parsed

WORDS = [*sorted(TAGS), "weather", "now", "city", "days", "2", "a", "<", ">", " ", "\n", "é"]
WORDS += [" " * 40]  # two of them are more than is held back before a call


ANSWERS = st.lists(
    st.sampled_from([*WORDS, call("weather", city="Rome"), call("now")]), max_size=25
).map("".join)


@given(ANSWERS, st.booleans(), st.data())
@example("why</think>" + GLM_4_5, True, None)
def test_cuts_do_not_change_what_an_answer_says(answer, thinking, data):
    expected = parsed([answer], thinking)
    assert parsed(answer, thinking) == expected
    if data:
        cuts = sorted(data.draw(st.sets(st.integers(0, len(answer)))))
        parts = [answer[a:b] for a, b in itertools.pairwise([0, *cuts, len(answer)])]
        assert parsed(parts, thinking) == expected


@given(ANSWERS, st.booleans())
def test_nothing_but_tags_and_whitespace_is_lost(answer, thinking):
    reply = parsed([answer], thinking)
    given_out = reply.reasoning + reply.content + "".join(itertools.chain(*reply.calls))
    for word in ("é", "weather", "Rome"):
        assert given_out.count(word) == answer.count(word)


def test_text_that_cannot_be_a_call_is_given_out_at_once():
    parser = ReplyParser(True, TOOLS)
    shown = [
        parser.push(part) for part in ("a<", "/th", "ink>", "\n", "b", " <tool_call>", "n", "ew")
    ]
    assert shown == [
        [Reasoning("a")],
        [],
        [],
        [],
        [Content("b")],
        [],
        [],
        [Content(" <tool_call>"), Content("new")],
    ]
    assert parser.finish() == []


# As GLM-5.2's own renders an assistant's turn.
TEMPLATE = """
{%- for m in messages -%}
<|assistant|><think>{{ m.reasoning_content }}</think>{{ m.content.strip() }}
{%- for call in m.tool_calls -%}
<tool_call>{{ call.function.name }}
{%- for k, v in call.function.arguments.items() -%}
<arg_key>{{ k }}</arg_key><arg_value>{{ v if v is string else v | tojson }}</arg_value>
{%- endfor -%}
</tool_call>
{%- endfor -%}
{%- endfor -%}
"""


TEXT = st.text(st.characters(codec="utf-8") | st.sampled_from("<>/\n {}\"'é"), max_size=20).filter(
    lambda text: not any(tag in text for tag in TAGS)
)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner | TEXT),
    max_leaves=5,
)


CALLS = st.one_of(
    st.tuples(st.just("weather"), st.fixed_dictionaries({"city": TEXT, "days": st.integers()})),
    st.tuples(st.just("weather_map"), st.fixed_dictionaries({"area": st.lists(JSON)})),
    st.tuples(st.just("now"), st.dictionaries(TEXT, JSON, max_size=3)),
)


@given(TEXT, TEXT, st.lists(CALLS, max_size=3))
def test_an_answer_that_a_template_renders_is_parsed_back(reasoning, content, calls):
    message = {
        "reasoning_content": reasoning,
        "content": content,
        "tool_calls": [{"function": {"name": n, "arguments": a}} for n, a in calls],
    }
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment()
    environment.filters["tojson"] = json.dumps
    rendered = environment.from_string(TEMPLATE).render(messages=[message])
    turn = "<|assistant|><think>"
    assert rendered.startswith(turn) and starts_thinking(turn)
    reply = parsed(rendered.removeprefix(turn), thinking=True)
    assert (reply.reasoning, reply.content) == (reasoning, content.strip())
    assert [(name, json.loads(arguments)) for name, arguments in reply.calls] == calls
