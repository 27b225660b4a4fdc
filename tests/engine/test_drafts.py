"""Drafts change how fast a text comes, and nothing else."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.errors import InputError
from glm5_jax.inference.engine import Engine
from glm5_jax.inference.request import Request, Sampling
from glm5_jax.model import forward, logits
from glm5_jax.places import Places
from tests.engine.asking import SLOTS, WAYS, ask, finish, many_requests, texts
from tests.tiny import SHARED, build_model, random_model, random_weights
from tests.trained import LEARNER, text


@pytest.mark.parametrize("way", WAYS, ids=range(len(WAYS)))
def test_drafts_change_how_fast_a_text_comes_and_nothing_else(trained, way):
    requests = many_requests(100 if way == Sampling() else 12, way)
    plain, statistics = ask(trained, requests)
    assert statistics.work.drafted_tokens == 0
    for drafts in (1, 3) if way == Sampling() else (3,):
        drafted, statistics = ask(trained, requests, draft_tokens=drafts)
        assert drafted == plain
        work = statistics.work
        assert work.accepted_tokens + work.main_steps >= statistics.generated_tokens
    assert work.accepted_tokens > work.main_steps / 4


@pytest.mark.parametrize("shares", [False, True])
def test_drafts_of_a_model_that_learned_nothing_do_no_harm(shares):
    model = random_model(SHARED | {"index_share_for_mtp_iteration": shares})
    requests = many_requests(50, Sampling())
    assert ask(model, requests, draft_tokens=3)[0] == ask(model, requests)[0]


def distribution(model, prompt, num_tokens, length, temperature):
    """The probability of every continuation, of all of which the model reads the whole."""
    continuations = list(itertools.product(range(num_tokens), repeat=length))
    tokens_BT = jnp.array([[*prompt, *each] for each in continuations])

    @jax.jit
    def chances(tokens_BT):
        hidden_BTD = forward(model, tokens_BT, Places.unpadded(*tokens_BT.shape)).hidden_BTD
        before = slice(len(prompt) - 1, len(prompt) - 1 + length)
        scores_BTZ = logits(model, hidden_BTD)[:, before, :num_tokens]
        chance_BTZ = jax.nn.softmax(scores_BTZ / temperature)
        chosen_BT1 = tokens_BT[:, len(prompt) :, None]
        return jnp.prod(jnp.take_along_axis(chance_BTZ, chosen_BT1, axis=-1), axis=(1, 2))

    return dict(zip(continuations, chances(tokens_BT).tolist(), strict=True))


def test_sampled_texts_with_drafts_have_the_models_distribution():
    """Chi-squared over all 64 texts of three tokens, of four; many of them drafted."""
    model, prompt, temperature, count = random_model(LEARNER), tuple(text(0, 11)), 2.0, 3000
    way = Sampling(temperature=temperature, seed=7)
    requests = [
        Request(prompt=prompt, max_new_tokens=3, sampling=way, number=number)
        for number in range(count)
    ]
    engine = Engine(model, slots=SLOTS, context=16, num_tokens=4, draft_tokens=2)
    found = texts(engine, requests)
    work = engine.statistics().work
    assert work.accepted_tokens > work.main_steps / 5
    expected = distribution(model, prompt, 4, 3, temperature)
    statistic = sum(
        (found.count(list(each)) - count * chance) ** 2 / (count * chance)
        for each, chance in expected.items()
    )
    assert min(expected.values()) * count > 1
    # with 63 degrees of freedom it exceeds 103.4 once in 1000 times
    assert statistic < 103.4


@pytest.mark.parametrize("drafts", [0, 3])
def test_likelihoods_are_those_of_reading_the_text(trained, drafts):
    prompt, way = tuple(text(1, 9)), Sampling(temperature=1.5, top_k=5, seed=1)
    engine = Engine(trained, slots=SLOTS, context=64, draft_tokens=drafts)
    asked = Request(prompt=prompt, max_new_tokens=8, sampling=way, alternatives=3)
    bare = Request(prompt=prompt, max_new_tokens=8, sampling=way, alternatives=0)
    silent = Request(prompt=prompt, max_new_tokens=8, sampling=way)
    events, few, none = finish(engine, [asked, bare, silent])
    tokens = jnp.array([[*prompt, *(event.token for event in events)]])
    hidden = forward(trained, tokens, Places.unpadded(*tokens.shape)).hidden_BTD
    expected = jax.nn.log_softmax(logits(trained, hidden)[0], axis=-1)
    for place, event in enumerate(events, start=len(prompt) - 1):
        np.testing.assert_allclose(
            event.likelihood.logprob, expected[place, event.token], atol=1e-4
        )
        best = np.argsort(-np.asarray(expected[place]), kind="stable")[:3]
        assert [token for token, _ in event.likelihood.alternatives] == best.tolist()
        np.testing.assert_allclose(
            [logprob for _, logprob in event.likelihood.alternatives],
            expected[place, best],
            atol=1e-4,
        )
    assert all(event.likelihood.alternatives == () for event in few)
    assert all(event.likelihood is None for event in none)


def test_a_bfloat16_model_is_continued_with_drafts_too():
    model = build_model(LEARNER, random_weights(LEARNER), jnp.bfloat16)
    requests = many_requests(4, Sampling())
    found, statistics = ask(model, requests, draft_tokens=2)
    assert [len(each) for each in found] == [12] * 4 and statistics.work.drafted_tokens > 0


def test_drafting_without_the_layer_is_refused():
    model = random_model(LEARNER | {"num_nextn_predict_layers": 0})
    with pytest.raises(InputError, match="no MTP layer"):
        Engine(model, draft_tokens=1)
