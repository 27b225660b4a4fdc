import collections
import math
import random
import re
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm5_jax.errors import InputError
from tests.text import prepare_texts
from train.data import Data
from train.pipeline import Pipeline

LENGTH = 16


def lines(name, count):
    """Long lines, which have no row in common."""
    draw = random.Random(name)
    return [" ".join(f"{name}{draw.random()}" for _ in range(9)) + "\n" for _ in range(count)]


SOURCES = {"a": lines("a", 40), "b": lines("b", 25), "c": lines("c", 10)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three sources, in shards smaller and larger than a row."""
    folder = tmp_path_factory.mktemp("data")
    return prepare_texts(folder / "data", SOURCES, shard_tokens=11)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return prepare_texts(folder / "data", {"a": SOURCES["a"]}, shard_tokens=999)


def known_rows(data, length=LENGTH):
    """The source and the number of every row, by its tokens, which no other row has."""
    rows = {}
    for source in data.sources:
        split = data.split("train", length, source=source)
        for number in range(split.num_rows):
            rows[split.row(number).tobytes()] = (source, number)
    assert len(rows) == sum(data.split("train", length, source=s).num_rows for s in data.sources)
    return rows


def order(pipeline, data, start, stop):
    """Which rows have these numbers."""
    known = known_rows(data)
    return [known[row.tobytes()] for row in pipeline.batch(start, stop - start).tokens_BT]


def assert_equal(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype == np.int32
        np.testing.assert_array_equal(one, other)


def test_every_row_is_seen_once_per_epoch_in_another_order_each(data):
    pipeline = Pipeline(data, LENGTH, None, seed=3)
    every = sorted(known_rows(data).values())
    assert pipeline.num_rows == len(every) > 300
    epochs = [
        order(pipeline, data, epoch * len(every), (epoch + 1) * len(every)) for epoch in range(4)
    ]
    for epoch in epochs:
        assert sorted(epoch) == every
    for source in data.sources:
        orders = [tuple(row for row in epoch if row[0] == source) for epoch in epochs]
        assert len({*orders, tuple(sorted(orders[0]))}) == 5


def test_seeds_and_sources_have_orders_of_their_own(data):
    rows = [order(Pipeline(data, LENGTH, None, seed), data, 0, 900) for seed in (0, 0, 1, 2)]
    assert rows[0] == rows[1]
    assert len({tuple(each) for each in rows}) == 3
    # grain's seed of an epoch is the sum of both: one seed's second epoch is no other's first
    count = Pipeline(data, LENGTH, None, 0).num_rows
    assert rows[0][count:] != rows[2][: 900 - count]


def test_sources_of_one_size_are_not_shuffled_alike(tmp_path):
    sources = {"one": SOURCES["a"], "two": SOURCES["a"]}
    data = prepare_texts(tmp_path / "data", sources)
    rows = [Pipeline(data, LENGTH, {name: 1}, 0).batch(0, 100).tokens_BT for name in sources]
    assert (rows[0] != rows[1]).any(axis=1).mean() > 0.9


def test_the_order_of_a_source_does_not_depend_on_the_others(data):
    both = order(Pipeline(data, LENGTH, {"a": 1, "b": 3}, seed=5), data, 0, 400)
    one = order(Pipeline(data, LENGTH, {"a": 1}, seed=5), data, 0, 100)
    assert [row for row in both if row[0] == "a"] == one


@pytest.mark.parametrize(
    "mixture",
    [
        {"a": 1, "b": 1, "c": 1},
        {"a": 0.7, "b": 0.2, "c": 0.1},
        {"a": 1e-3, "c": 0.07},
        {"a": 1, "b": 1.007, "c": 0.0},
        {"b": math.pi, "a": 1e6},
    ],
)
def test_a_mixture_has_its_shares_of_any_number_of_rows(data, mixture):
    pipeline = Pipeline(data, LENGTH, mixture, seed=0)
    rows = order(pipeline, data, 0, 3000)
    for count in (1, 10, 100, 1000, 3000):
        seen = collections.Counter(source for source, _ in rows[:count])
        for source, weight in mixture.items():
            share = count * weight / sum(mixture.values())
            # each of the sources before it in the list is rounded, too
            assert abs(seen[source] - share) <= len(mixture)


def test_a_mixture_goes_through_each_source_evenly(data):
    pipeline = Pipeline(data, LENGTH, {"a": 1, "c": 3}, seed=0)
    of_c = [number for source, number in order(pipeline, data, 0, 2000) if source == "c"]
    rows = data.split("train", LENGTH, source="c").num_rows
    assert pipeline.num_rows == rows + data.split("train", LENGTH, source="a").num_rows
    for epoch in range(len(of_c) // rows):
        assert sorted(of_c[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


sizes = st.lists(
    st.tuples(st.integers(1, 9), st.sampled_from([slice(None), slice(1, 4), slice(0, 1)])),
    min_size=1,
    max_size=8,
).map(lambda calls: [(size, part if size > 1 else slice(None)) for size, part in calls])


@given(st.integers(0, 10**6), st.integers(0, 2**32 - 1), sizes)
def test_a_reader_gives_what_batches_are_from_any_row_on(data, first_row, seed, calls):
    pipeline = Pipeline(data, LENGTH, {"a": 2, "b": 1}, seed)
    with pipeline.read(first_row) as reader:
        for size, part in calls * 2:
            assert_equal(reader.next(size, part), pipeline.batch(first_row, size, part))
            first_row += size


@given(st.integers(0, 10**5), st.integers(1, 12), st.integers(0, 12), st.integers(0, 12))
def test_parts_make_up_the_batch(data, first_row, size, one, other):
    pipeline = Pipeline(data, LENGTH, None, 0)
    whole = pipeline.batch(first_row, size)
    cuts = sorted({0, min(one, size), min(other, size), size})
    parts = [
        pipeline.batch(first_row, size, slice(*cut)) for cut in zip(cuts, cuts[1:], strict=False)
    ]
    for axis in range(2):
        np.testing.assert_array_equal(np.concatenate([part[axis] for part in parts]), whole[axis])
    alone = [pipeline.batch(first_row + n, 1) for n in range(size)]
    np.testing.assert_array_equal(np.concatenate([row.tokens_BT for row in alone]), whole.tokens_BT)


@given(st.integers(1, 40), st.integers(1, 60))
def test_rows_do_not_depend_on_shards(tmp_path_factory, data, length, number):
    """Rows of one token up to rows of four shards, against tokens read from the files."""
    split = data.split("train", length, source="b")
    paths = sorted(data.directory.glob("b-train-*.npy"))
    tokens = np.concatenate([np.load(path) for path in paths])
    start = number % split.num_rows * length
    np.testing.assert_array_equal(
        split.row(number % split.num_rows), tokens[start : start + length]
    )


def test_documents_are_numbered_and_go_on_in_the_next_row(alone):
    """Documents are longer than a row, and none is cut off: rows in order are all of the text."""
    pipeline = Pipeline(alone, LENGTH, None, 0)
    batch = pipeline.batch(0, pipeline.num_rows)
    assert max(np.diff(np.flatnonzero(alone.tokens("train").read(0, 2000) == 0))) > 2 * LENGTH
    for tokens, segments in zip(*batch, strict=True):
        expected, segment = [], 1
        for token in tokens:
            expected.append(segment)
            segment += token == alone.end_id
        assert segments.tolist() == expected


def test_a_run_of_several_processes_reads_the_rows_of_one(data):
    pipeline = Pipeline(data, LENGTH, None, 0)
    with pipeline.read(7) as first, pipeline.read(7) as second, pipeline.read(7) as whole:
        for _ in range(5):
            parts = first.next(8, slice(0, 4)), second.next(8, slice(4, 8))
            expected = whole.next(8)
            for axis in range(2):
                both = np.concatenate([part[axis] for part in parts])
                np.testing.assert_array_equal(both, expected[axis])


def reading():
    """Whether a thread reads ahead."""
    return any(thread.name.startswith("grain-prefetch") for thread in threading.enumerate())


def test_a_reader_reads_ahead_and_ends_its_threads(data):
    pipeline = Pipeline(data, LENGTH, None, 0)
    taken, real = [], pipeline.batch
    pipeline.batch = lambda row, *rest: taken.append(row) or real(row, *rest)
    with pipeline.read(30) as reader:
        reader.next(10)
        until = time.monotonic() + 30
        while len(taken) < 3 and time.monotonic() < until:
            time.sleep(0.01)
        assert taken[:3] == [30, 40, 50]
        assert reading()
        reader.next(5)
    until = time.monotonic() + 30
    while reading() and time.monotonic() < until:
        time.sleep(0.01)
    assert not reading()


def test_a_shard_that_vanishes_is_named_by_the_reader(data, tmp_path):
    shutil.copytree(data.directory, tmp_path / "data")
    pipeline = Pipeline(Data(tmp_path / "data"), LENGTH, None, 0)
    for path in (tmp_path / "data").glob("*-train-*.npy"):
        path.unlink()
    with (
        pipeline.read(0) as reader,
        pytest.raises(InputError, match=r"-train-\d{5}\.npy: missing"),
    ):
        reader.next(4)


@pytest.mark.parametrize(
    ("mixture", "named"),
    [
        ({"a": 1, "d": 1}, "mixture names 'd', expected weights of the sources a, b, c of "),
        ({"a": -1}, "mixture gives a the weight -1, expected"),
        ({"a": math.nan}, "mixture gives a the weight nan, expected"),
        ({"a": 1, "b": math.inf}, "mixture gives b the weight inf, expected"),
        ({"a": 0, "b": 0.0}, "mixture is {'a': 0, 'b': 0.0}, expected"),
        ({}, "mixture is {}, expected weights of the sources a, b, c of "),
    ],
)
def test_a_mixture_that_cannot_be_is_named(data, mixture, named):
    with pytest.raises(InputError, match=re.escape(named)):
        Pipeline(data, LENGTH, mixture, 0)


def test_too_few_rows_are_refused(data):
    rows = Pipeline(data, LENGTH, {"c": 1}, 0).num_rows
    assert Pipeline(data, LENGTH, {"c": 1}, 0, at_least=rows).num_rows == rows
    with pytest.raises(InputError, match=rf"has {rows} rows .* at least {rows + 1} x 16 tokens"):
        Pipeline(data, LENGTH, {"c": 1}, 0, at_least=rows + 1)
    with pytest.raises(InputError, match=r"source 'a' has \d+ tokens .* at least 1 x 5000 of"):
        Pipeline(data, 5000, None, 0)


def test_grain_is_not_loaded_to_parse_a_command():
    code = "import sys, train.__main__, train.evaluation; print('grain' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("module", "package", "user"),
    [("train.pipeline", "grain", "training"), ("train.encode", "tokenizers", "text")],
)
def test_what_a_run_needs_is_named(module, package, user):
    code = f"import sys; sys.modules['{package}'] = None; import {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"{user} needs the package {package}: pip install 'glm5-jax[train]'" in done.stderr
