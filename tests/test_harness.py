"""Answers to lm-eval's requests, by hand and against lm-eval's own model for transformers."""

import importlib

import numpy as np
import pytest

from glm5_jax.errors import InputError
from glm5_jax.inference.generate import Generator
from glm5_jax.inference.request import Sampling
from tests.likelihood import (
    CHAT_TEMPLATE,
    END,
    RAW,
    START,
    TEXT,
    by_hand,
    model,
    partition,
    predictions,
    write_tokenizer,
)
from tests.tiny import build_model, random_weights

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
harness = importlib.import_module("glm5_jax.inference.harness")
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


@pytest.fixture(scope="module", params=[(), (START, "$A")], ids=["plain", "special"])
def tokenizer(request, tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), request.param)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def requests(kind, arguments):
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


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


@pytest.fixture
def chatting(tokenizer, tmp_path):
    """The same tokenizers, with a chat template that begins with the special token."""
    special = (START, "$A") if tokenizer.encode("") else ()
    (tmp_path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
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
