"""What is measured of held-out text, against the reference and against what drafting counts."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.collectives import MESH_AXES
from glm5_jax.inference.engine import Engine
from glm5_jax.inference.request import Request, Sampling
from glm5_jax.mesh import make_mesh
from glm5_jax.model import Glm5, forward, logits, predict_ahead
from glm5_jax.params import leaves_by_path
from glm5_jax.places import Places
from glm5_jax.sharding import TRAIN, Partition, on_one_device
from tests.reference.numpy_glm5 import Layer, NumpyGlm5
from tests.test_accumulation import segments_of
from tests.tiny import SHARED, build_model, random_weights
from tests.trained import text, trained_model
from train.evaluation import make_evaluate, measured
from train.loss import Objective

# Two layers of the four are served by the indexer of another.
RAW = SHARED | {"num_hidden_layers": 4, "vocab_size": 104, "num_attention_heads": 8}
RAW |= {"num_key_value_heads": 8, "indexer_types": ["full", "full", "shared", "shared"]}
RAW |= {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}
WEIGHTS = random_weights(RAW)
LENGTH, DEPTH, TOPK = 20, 2, RAW["index_topk"]
# One is as long as what is selected, most are shorter; the last row is all padding.
LENGTHS = [(20,), (9, 11), (8, 6, 6), (12, 3), (3, 17), (1, 2, 16), (10,), ()]
SEGMENTS = segments_of(LENGTHS, LENGTH)
TOKENS = np.random.default_rng(0).integers(2, 95, SEGMENTS.shape).astype(np.int32)

pytestmark = pytest.mark.standard_promotion


def evaluate(model, tokens, segments, stage="sparse", depth=DEPTH, shape=None, rows=4):
    """The numbers of all rows, some at a time."""
    partition = on_one_device()
    if shape is not None:
        partition = Partition(make_mesh(dict(zip(MESH_AXES, shape, strict=True))), TRAIN)
    objective = Objective(stage=stage, mtp_depth=depth, mtp_weight=0.3, index_weight=1.0)
    compiled = make_evaluate(model.config, objective, partition, "float32")
    params = leaves_by_path(partition.place(model, Glm5(model.config)))
    starts = range(0, len(tokens), rows)
    return measured(compiled(params, tokens[i : i + rows], segments[i : i + rows]) for i in starts)


@functools.cache
def model():
    return build_model(RAW, WEIGHTS)


def expected_numbers(monkeypatch, stage):
    """By the reference, which reads every document alone."""
    shares, chosen, route = (
        collections.defaultdict(list),
        collections.defaultdict(list),
        Layer.route,
    )

    def watch(layer, t, probs, selection):
        if t + 1 > TOPK:
            shares[layer.prefix].append(probs[selection].sum())

    def watched_route(layer, x):
        experts, gates = route(layer, x)
        chosen[layer.prefix].extend(experts)
        return experts, gates

    reference = NumpyGlm5(WEIGHTS, RAW)
    nats, agreed = [[] for _ in range(DEPTH + 1)], [[] for _ in range(DEPTH + 1)]
    monkeypatch.setattr(Layer, "attends_to_all", stage != "sparse")
    for row, lengths in zip(TOKENS, LENGTHS, strict=True):
        for end, length in zip(np.cumsum(lengths, dtype=int), lengths, strict=True):
            ids = row[end - length : end].tolist()
            own = reference.logits(ids)
            with monkeypatch.context() as patch:
                patch.setattr(Layer, "watch", watch)
                patch.setattr(Layer, "route", watched_route)
                ahead = reference.mtp_logits(ids, min(DEPTH, length - 1))
            for i in range(length):
                agrees = True
                for depth, scores in enumerate([own, *ahead][: length - 1 - i]):
                    agrees &= scores[i].argmax() == own[i + depth].argmax()
                    agreed[depth].append(agrees)
                    nats[depth].append(
                        np.logaddexp.reduce(scores[i]) - scores[i, ids[i + depth + 1]]
                    )
    losses = list(map(np.mean, nats))
    return {
        "held_out_loss": losses[0],
        "held_out_mtp_losses": losses[1:],
        "mtp_acceptance": list(map(np.mean, agreed[1:])),
        "index_recall": [np.mean(shares[f"model.layers.{i}."]) for i in range(5)],
        "expert_loads": [
            np.bincount(chosen[f"model.layers.{i}."], minlength=8)
            / len(chosen[f"model.layers.{i}."])
            for i in range(1, 5)
        ],
    }


@pytest.mark.parametrize("stage", ["dense", "warmup", "sparse"])
def test_everything_measured_is_what_the_reference_gives(monkeypatch, stage):
    expected = expected_numbers(monkeypatch, stage)
    actual = evaluate(model(), TOKENS, SEGMENTS, stage)
    assert actual.keys() == expected.keys()
    np.testing.assert_allclose(actual.pop("expert_loads"), expected["expert_loads"], atol=5.1e-6)
    for name, value in actual.items():
        np.testing.assert_allclose(value, expected[name], rtol=2e-5, err_msg=name)
    recalls = actual["index_recall"]
    assert max(recalls) < 0.9 and min(np.diff(np.sort(recalls))) > 1e-3, "no mix-up goes unseen"


@pytest.mark.parametrize(
    ("shape", "stage"), [((8, 1, 1), "sparse"), ((2, 2, 2), "dense"), ((1, 2, 4), "sparse")]
)
def test_eight_devices_measure_what_one_does(monkeypatch, shape, stage):
    """Attending to a few queries at a time, whose number no mesh divides."""
    expected = evaluate(model(), TOKENS, SEGMENTS, stage)
    monkeypatch.setattr("glm5_jax.queries.BLOCK_BYTES", 2**14)
    actual = evaluate(model(), TOKENS, SEGMENTS, stage, shape=shape, rows=8)
    for name, value in actual.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_nothing_is_said_of_layers_and_depths_that_say_nothing():
    """Documents no longer than what is selected, or rows; and a model without MTP."""
    short = segments_of([(8, 8, 4), (5, 8, 7)], LENGTH)
    numbers = evaluate(model(), TOKENS[:2], short, rows=2)
    assert numbers["index_recall"] == [] and len(numbers["mtp_acceptance"]) == DEPTH
    numbers = evaluate(model(), TOKENS[:2, :8], short[:, :8], rows=2)
    assert numbers["index_recall"] == []
    numbers = evaluate(model(), TOKENS, SEGMENTS, depth=0, rows=8)
    assert numbers["mtp_acceptance"] == numbers["held_out_mtp_losses"] == []
    assert len(numbers["index_recall"]) == 4 and len(numbers["expert_loads"]) == 3


@pytest.fixture(scope="module")
def learned():
    """A model that is often right, a text, and the text's numbers to three tokens ahead."""
    tokens = np.array([text(seed, 24) for seed in range(100, 104)], np.int32)
    tokens[:, 11] = 50  # no phrase has it, so that drafts fail
    return trained_model(), tokens, evaluate(trained_model(), tokens, tokens * 0 + 1, depth=3)


def test_accepted_drafts_are_those_that_agree_to_the_last(learned):
    model, tokens, numbers = learned
    places = Places.unpadded(*tokens.shape)

    @jax.jit
    def likeliest(model):
        hidden = forward(model, tokens, places).hidden_BTD
        ahead = predict_ahead(model, hidden, jnp.asarray(tokens), places, 3)
        hiddens = [hidden, *(each for each, _ in ahead)]
        return [jnp.argmax(logits(model, each), axis=-1) for each in hiddens]

    own, *drafts = map(np.asarray, likeliest(model))
    for depth in (1, 2, 3):
        runs = [
            all(drafts[d - 1][b, i] == own[b, i + d] for d in range(1, depth + 1))
            for b in range(len(tokens))
            for i in range(24 - 1 - depth)
        ]
        np.testing.assert_allclose(numbers["mtp_acceptance"][depth - 1], np.mean(runs), rtol=1e-6)
    assert 0.3 < numbers["mtp_acceptance"][2] < numbers["mtp_acceptance"][0] < 1


def test_the_first_draft_is_accepted_as_often_as_in_decoding(learned):
    """From every place of the text a model drafts once, and once more only if it was wrong."""
    model, tokens, numbers = learned
    engine = Engine(model, slots=8, context=64, draft_tokens=1)
    for row in tokens:
        for end in range(2, len(row)):
            prompt = tuple(map(int, row[:end]))
            engine.submit(Request(prompt=prompt, max_new_tokens=2, sampling=Sampling()))
    works = []
    while not engine.is_idle:
        works += [event.work for event in engine.step() if event.work is not None]
    assert len(works) == 4 * 22
    accepted = np.mean([work.main_steps == 1 for work in works])
    np.testing.assert_allclose(numbers["mtp_acceptance"][0], accepted, rtol=1e-6)
