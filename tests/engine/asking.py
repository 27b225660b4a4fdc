"""Requests, and what an engine makes of them."""

import collections

from glm5_jax.inference.engine import Engine
from glm5_jax.inference.request import Request, Sampling
from tests.trained import text

SLOTS = 4  # of most engines here, so that they share what is compiled
WAYS = [
    Sampling(),
    Sampling(temperature=1.0, seed=1),
    Sampling(temperature=1.3, seed=2, top_p=0.9, min_p=0.01),
    Sampling(temperature=0.8, seed=3, top_k=20, repetition_penalty=1.3),
    Sampling(presence_penalty=1.0, frequency_penalty=0.5, logit_bias={5: 2.0, 9: -100.0}),
]


def finish(engine, requests):
    """The events of each request, all submitted at once."""
    numbers = [engine.submit(request) for request in requests]
    events = collections.defaultdict(list)  # of other requests too
    while not engine.is_idle:
        for event in engine.step():
            events[event.request].append(event)
    return [events[number] for number in numbers]


def texts(engine, requests):
    return [[event.token for event in events] for events in finish(engine, requests)]


def many_requests(count, way, new=12):
    return [
        Request(
            prompt=tuple(text(seed, 2 + seed % 17)), max_new_tokens=new, sampling=way, number=seed
        )
        for seed in range(count)
    ]


def ask(model, requests, **options):
    engine = Engine(model, slots=SLOTS, context=64, **options)
    return texts(engine, requests), engine.statistics()
