import errno
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from glm5_jax.errors import InputError
from glm5_jax.inference.tokenizer import Tokenizer
from tests.text import documents, prepare_texts
from train.corpus import Document
from train.data import Data
from train.encode import prepare
from train.shards import ShardWriter, Tokens, shard_path, token_dtype
from train.tokenizer import train_tokenizer

TEXTS = [f"def f{i}(x):\n    return x + {i}\n" * (i % 6 + 1) for i in range(60)]


@pytest.mark.parametrize("held_out", [True, False])
@pytest.mark.parametrize("size", [10, 2**26])
def test_few_documents_leave_at_least_one_for_each_split(tmp_path, monkeypatch, held_out, size):
    """Also where only the first two are looked at before the splits are decided upon."""
    monkeypatch.setattr("train.encode._SAMPLE", size)
    sources = {
        name: iter([Document(f"{n}.py", f"x = {n}\n" * 40, held_out) for n in range(count)])
        for name, count in (("a", 2), ("b", 5))
    }
    data = prepare(sources, tmp_path / "data", 300, None)
    many, few = ("held_out", "train") if held_out else ("train", "held_out")
    assert data.num_documents(few, "a") == data.num_documents(many, "a") == 1
    assert (data.num_documents(few, "b"), data.num_documents(many, "b")) == (1, 4)
    moved = data.tokens(few, "b")
    assert Tokenizer(data.directory).decode(moved.read(0, len(moved)).tolist()) == "x = 0\n" * 40


@pytest.mark.parametrize("held_out", [True, False])
def test_of_few_documents_most_text_is_to_train_on(tmp_path, held_out):
    texts = [f"x = {n}\n" * times for n, times in enumerate((3, 90, 2))]
    source = iter([Document(f"{n}.py", text, held_out) for n, text in enumerate(texts)])
    data = prepare({"a": source}, tmp_path / "data", 300, None)
    long = data.tokens("train", "a")
    assert len(long) > 9 * data.num_tokens("held_out", "a")


@pytest.mark.parametrize("held_out", [True, False])
def test_a_source_of_one_document_is_refused(tmp_path, held_out):
    sources = {"a": iter(documents(TEXTS)), "b": iter([Document("b", "x", held_out)])}
    with pytest.raises(InputError, match="source 'b' has 1 document, expected at least 2"):
        prepare(sources, tmp_path / "data", 300, None)
    assert list(tmp_path.iterdir()) == []


def test_documents_are_taken_as_they_come(tmp_path, monkeypatch):
    """No more of them are alive than the sample has and are encoded at once."""
    monkeypatch.setattr("train.encode._SAMPLE", 1000)
    monkeypatch.setattr("train.encode._AT_ONCE", 100)
    taken, encoded = [], []

    def come():
        for number, text in enumerate(TEXTS):
            taken.append(number)
            yield Document(f"{number}", text, number % 5 == 0)

    class Watched(Tokenizer):
        def encode_batch(self, texts):
            encoded.append((len(texts), len(taken)))
            return super().encode_batch(texts)

    monkeypatch.setattr("train.encode.Tokenizer", Watched)
    data = prepare({"a": come()}, tmp_path / "data", 300, None)
    assert data.num_documents("train") + data.num_documents("held_out") == len(TEXTS)
    assert encoded[0][1] < len(TEXTS) / 2
    done = 0
    for here, so_far in encoded:
        done += here
        assert so_far == done or so_far == encoded[0][1]


def test_the_first_text_to_train_on_teaches_the_tokenizer(tmp_path, monkeypatch):
    """Of each source its first hundred characters, of which the first document is held out."""
    seen = []

    def watched(texts, vocab_size):
        seen.extend(texts)
        return train_tokenizer(iter(seen), vocab_size)

    monkeypatch.setattr("train.encode._SAMPLE", 200)
    monkeypatch.setattr("train.encode.train_tokenizer", watched)
    prepare_texts(tmp_path / "data", {"a": TEXTS, "b": TEXTS[30:]})
    assert seen == [TEXTS[1], TEXTS[2], TEXTS[31], TEXTS[32]]


@pytest.mark.parametrize("text", ["a line\nand the next\n" * 40, "x" * 1000, "\n" * 700, "é" * 300])
def test_a_long_document_is_encoded_in_pieces_and_ended_once(tmp_path, monkeypatch, text):
    monkeypatch.setattr("train.encode._PIECE", 64)
    monkeypatch.setattr("train.encode._AT_ONCE", 200)
    sources = {"a": iter([Document("held", "y", True), Document("long", text, False)])}
    data = prepare(sources, tmp_path / "data", 300, None)
    tokens = data.tokens("train").read(0, data.num_tokens("train"))
    assert np.flatnonzero(tokens == data.end_id).tolist() == [len(tokens) - 1]
    assert Tokenizer(data.directory).decode(tokens.tolist()) == text
    assert data.num_documents("train") == 1
    assert data.bytes_per_token("train") == len(text.encode()) / len(tokens)


def test_the_bar_moves_by_the_sizes_of_documents(tmp_path, monkeypatch):
    monkeypatch.setattr("train.encode._PIECE", 50)
    moved = []

    class Bar:
        def __init__(self, description, total):
            assert (description, total) == ("tokenize", 60)

        def __enter__(self):
            return moved.append

        def __exit__(self, *error):
            pass

    monkeypatch.setattr("train.encode.progress", Bar)
    given = [document._replace(size=n) for n, document in enumerate(documents(TEXTS))]
    prepare({"a": iter(given)}, tmp_path / "data", 300, None, size=60)
    assert sum(moved) == sum(range(60)) and max(moved) == 59


@pytest.mark.parametrize("vocab_size", [2**16, 2**16 + 1])
def test_every_token_fits_on_disk(tmp_path, vocab_size):
    dtype = token_dtype(vocab_size)
    with ShardWriter(tmp_path, "a", "train", dtype, 3) as writer:
        writer.write([vocab_size - 1] * 7)
    assert [shard.tokens for shard in writer.shards] == [3, 3, 1]
    assert np.load(tmp_path / "a-train-00002.npy").tolist() == [vocab_size - 1]
    shards = [(shard_path(tmp_path, "a", "train", number), 3) for number in range(2)]
    assert Tokens(shards, dtype).read(1, 5).tolist() == [vocab_size - 1] * 4


def test_a_disk_that_is_full_is_named_and_leaves_nothing(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        with pytest.raises(InputError) as caught:
            prepare_texts(tmp_path / "data", {"a": [text * 400 for text in TEXTS]})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    expected = f"{tmp_path / 'data'}: cannot be written: {os.strerror(errno.EFBIG)}"
    assert str(caught.value) == expected
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_command_that_is_killed_leaves_nothing_under_the_name(tmp_path, number):
    command = [sys.executable, "-m", "train", "prepare", str(tmp_path / "data")]
    process = subprocess.Popen([*command, "--vocab-size", "300"], stderr=subprocess.PIPE)
    until = time.monotonic() + 60
    while not list(tmp_path.glob(".data.partial-*/*.npy")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    assert not (tmp_path / "data").exists()
    if number == signal.SIGTERM:
        assert error == b"glm5-train: terminated\n" and list(tmp_path.iterdir()) == []
    assert Data(prepare_texts(tmp_path / "data", {"a": TEXTS}).directory).num_tokens("train")


def test_an_end_token_in_a_text_is_text(tmp_path):
    """This project's own sources have it in them."""
    texts = ["def f():\n    return '<|endoftext|>'\n" * 3] * 5
    data = prepare_texts(tmp_path / "data", {"code": texts})
    tokens = data.tokens("train").read(0, data.num_tokens("train"))
    assert np.count_nonzero(tokens == data.end_id) == 4, "one at the end of each document"
    assert Tokenizer(tmp_path / "data").encode("<|endoftext|>") == [data.end_id], "not in prompts"
