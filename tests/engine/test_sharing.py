"""Requests share slots, pages and programs, and do not notice each other."""

import dataclasses

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm5_jax.errors import InputError
from glm5_jax.inference.engine import Engine
from glm5_jax.inference.request import Request, Sampling
from tests.engine.asking import SLOTS, WAYS, ask, finish, texts
from tests.trained import text

POOL = [
    Request(
        prompt=tuple(text(seed // 2, 1 + (5 * seed) % 37)),
        max_new_tokens=1 + (7 * seed) % 15,
        sampling=WAYS[seed % len(WAYS)],
        number=seed,
        stop=frozenset([82]) if seed % 3 else frozenset(),
        alternatives=2 if seed % 4 == 1 else None,
    )
    for seed in range(14)
]


@pytest.fixture(scope="module")
def alone(trained):
    """Every request's text, without drafts, by itself."""
    results = []
    for request in POOL:
        engine = Engine(trained, slots=SLOTS, context=64)
        (events,) = finish(engine, [request])
        results.append([(event.token, event.finish_reason) for event in events])
    return results


@settings(max_examples=12)
@given(data=st.data())
def test_a_request_does_not_notice_who_else_is_there(trained, alone, data):
    """Under random arrivals, cancellations and so little memory that some must wait and return."""
    cache_tokens = data.draw(st.sampled_from([80, 256]))
    engine = Engine(trained, slots=SLOTS, context=64, cache_tokens=cache_tokens, draft_tokens=3)
    order = data.draw(st.permutations(range(len(POOL))))
    arrivals = [data.draw(st.integers(0, 12)) for _ in order]
    cancelled = {
        n: data.draw(st.integers(0, 30)) for n in data.draw(st.sets(st.sampled_from(order)))
    }
    numbers, events = {}, {n: [] for n in order}
    for time in range(400):
        for n, arrival in zip(order, arrivals, strict=True):
            if arrival == time:
                numbers[engine.submit(POOL[n])] = n
        for number, n in numbers.items():
            if cancelled.get(n) == time:
                engine.cancel(number)
        for event in engine.step():
            events[numbers[event.request]].append((event.token, event.finish_reason))
        if time >= 30 and engine.is_idle:
            break
    for n in order:
        got = events[n]
        assert got == alone[n][: len(got)]
        assert n in cancelled or len(got) == len(alone[n])
    statistics = engine.statistics()
    assert (statistics.running, statistics.waiting, statistics.pages_held) == (0, 0, 0)
    assert statistics.finished == len(POOL)


def test_requests_that_give_way_go_on_as_if_nothing_had_been(trained):
    """Two texts of 50 tokens do not fit a cache of 80: the later one is read again."""
    way = Sampling(temperature=1.0, presence_penalty=0.5, seed=4)
    requests = [
        Request(prompt=tuple(text(n, 5)), max_new_tokens=45, sampling=way, number=n)
        for n in range(2)
    ]
    roomy, _ = ask(trained, requests, draft_tokens=3)
    engine = Engine(trained, slots=SLOTS, context=64, cache_tokens=80, draft_tokens=3)
    numbers = [engine.submit(request) for request in requests]
    found, gave_way = {number: [] for number in numbers}, False
    while not engine.is_idle:
        for event in engine.step():
            found[event.request].append(event.token)
        gave_way |= engine.statistics().waiting == 1 and len(found[numbers[1]]) > 0
    assert gave_way
    assert [found[number] for number in numbers] == roomy


@pytest.mark.parametrize("drafts", [0, 3])
def test_prompts_that_begin_alike_are_read_once(trained, drafts):
    prompt = tuple(text(3, 40))
    branches = [(*prompt[:30], 5, 6, 7), prompt, (*prompt, 8), prompt[:12], (9, *prompt)]
    requests = [Request(prompt=branch, max_new_tokens=6) for branch in branches]
    engine = Engine(trained, slots=SLOTS, context=64, draft_tokens=drafts)
    reused = []
    for request in requests:
        (events,) = finish(engine, [request])
        reused.append(events[-1].work.reused_tokens)
        fresh = Engine(trained, slots=SLOTS, context=64, draft_tokens=drafts)
        assert [event.token for event in events] == texts(fresh, [request])[0]
        if drafts:
            # What was drafted after reused pages is what would be drafted after reading them.
            assert events[-1].work.accepted_tokens == finish(fresh, [request])[0][-1].work[3]
    # Pages of 4: what the first shares with the second, then all but the last token, and so on.
    assert reused == [0, 28, 40, 8, 0]
    assert engine.statistics().work.reused_tokens == sum(reused)


def test_memory_follows_what_is_used(trained):
    engine = Engine(trained, slots=SLOTS, context=64)
    held = []
    for length in (3, 20):
        engine.submit(Request(prompt=tuple(text(1, length)), max_new_tokens=9))
        engine.step()
        held.append(engine.statistics().pages_held)
    assert held == [1, 1 + 5]
    engine.cancel(1)
    assert engine.statistics().pages_held == 5
    while not engine.is_idle:
        engine.step()
    assert engine.statistics().pages_held == 0


def test_nothing_is_compiled_once_all_shapes_were_met(trained):
    engine = Engine(trained, slots=SLOTS, context=64, draft_tokens=3)
    for _ in range(2):  # with prompts read, and with prompts found
        texts(engine, POOL)
    first = engine.statistics().compilations
    seen = []

    def listen(name, duration, **_):
        if name == "/jax/core/compile/backend_compile_duration":
            seen.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        texts(engine, POOL)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert seen == [] and engine.statistics().compilations == first


def test_a_warm_up_compiles_all_that_is_needed_and_does_nothing_else(trained):
    engine = Engine(trained, slots=SLOTS + 1, context=64, draft_tokens=3)
    before = engine.statistics()
    assert before.compilations == 0  # for so many slots nothing was
    engine.warm_up(64)
    warm = engine.statistics()
    assert warm == dataclasses.replace(before, compilations=warm.compilations)
    assert warm.compilations == 1 + 2 * (2 + 1)  # two widths, of two portions and a step each
    expected = texts(Engine(trained, slots=SLOTS, context=64, draft_tokens=3), POOL)
    assert texts(engine, POOL) == expected
    assert engine.statistics().compilations == warm.compilations


@pytest.mark.parametrize(
    ("prompt", "new", "named"),
    [
        ((), 1, "is empty"),
        ((5, 97), 1, "token 97 is outside the vocabulary"),
        ((5, -1), 1, "token -1"),
        ((5,) * 60, 5, "needs a context of 65, expected at most 64"),
    ],
)
def test_a_request_that_cannot_be_continued_is_refused_at_once(trained, prompt, new, named):
    engine = Engine(trained, slots=SLOTS, context=64)
    with pytest.raises(InputError, match=named):
        engine.submit(Request(prompt=prompt, max_new_tokens=new))
    assert engine.is_idle


def test_a_cache_too_small_for_the_context_is_refused(trained):
    with pytest.raises(InputError, match="tokens are 9, 12 for a text, expected .* of 20"):
        Engine(trained, context=20, cache_tokens=9)


def test_a_prompt_is_read_the_same_while_others_go_on(trained):
    """What the MTP layer keeps of it, too: drafts of others must not get between its portions."""
    long, short = tuple(text(5, 45)), tuple(text(6, 3))
    found = []
    for neighbours in (0, 2):
        engine = Engine(trained, slots=SLOTS, context=64, draft_tokens=3)
        for number in range(neighbours):
            engine.submit(Request(prompt=short, max_new_tokens=40, number=number))
            engine.step()
        (events,) = finish(engine, [Request(prompt=long, max_new_tokens=15)])
        found.append(([event.token for event in events], events[-1].work))
    assert found[0] == found[1]


def test_choices_of_one_prompt_are_read_once(trained):
    way = Sampling(temperature=1.0, seed=1)
    requests = [
        Request(prompt=tuple(text(5, 45)), max_new_tokens=5, sampling=way, number=number)
        for number in range(SLOTS)
    ]
    engine = Engine(trained, slots=SLOTS, context=64, draft_tokens=3)
    reused = [events[-1].work.reused_tokens for events in finish(engine, requests)]
    assert reused == [0] + [44] * (SLOTS - 1)
