import gzip
import json
import re
import sys

import pyarrow
import pytest
from pyarrow import parquet

from glm5_jax.errors import InputError
from train.records import holds_records, read_records

TEXTS = ["one", "two\nlines", "naïve 北京 👋", "", " \u2028 "]


def write_jsonl(path, texts, field="text"):
    lines = [json.dumps({field: text, "other": [1]}) for text in texts]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_gzip(path, texts, field="text"):
    path.write_bytes(gzip.compress(write_jsonl(path, texts, field).read_bytes()))
    return path


def write_parquet(path, texts, field="text", kind=None):
    table = pyarrow.table({"other": range(len(texts)), field: pyarrow.array(texts, kind)})
    parquet.write_table(table, path, row_group_size=3)
    return path


WAYS = {"a.jsonl": write_jsonl, "a.jsonl.gz": write_gzip, "a.parquet": write_parquet}


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("field", ["text", "content"])
def test_texts_are_read_in_order_with_their_numbers(tmp_path, name, field):
    path = WAYS[name](tmp_path / name, TEXTS, field)
    assert holds_records(path)
    records = list(read_records(path, field))
    assert [(record.number, record.text) for record in records] == list(enumerate(TEXTS, start=1))
    assert sum(record.size for record in records) == path.stat().st_size


def test_large_strings_of_parquet_and_many_rows_are_read(tmp_path):
    texts = [str(number) for number in range(5000)]
    path = write_parquet(tmp_path / "a.parquet", texts, kind=pyarrow.large_string())
    assert [record.text for record in read_records(path, "text")] == texts


def test_lines_without_anything_are_none(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"text": "x"}\r\n  \n{"text": "y"}')
    assert [(record.number, record.text) for record in read_records(path, "text")] == [
        (2, "x"),
        (4, "y"),
    ]


def test_other_files_hold_no_records(tmp_path):
    assert not any(map(holds_records, (tmp_path / "a.json", tmp_path / "a.gz", tmp_path / "a.py")))


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (b'{"text": 3}', "text is 3, expected a text"),
        (b'{"other": "x"}', "text is None, expected a text"),
        (b'{"text": "x"', "not valid JSON: "),
        (b'{"text": "caf\xe9"}', "not valid JSON: "),
        (b'{"text": "\\ud800"}', "text is '\\ud800', expected valid Unicode"),
        (b'"x"', "expected a JSON object, found str"),
        (b'{"text": "x", "text": "y"}', "key 'text' stands twice"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, named):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(InputError, match=re.escape(f"{path}: line 2: {named}")) as caught:
        list(read_records(path, "text"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-9], "a.jsonl.gz"),
        (b"no such format", "a.jsonl.gz"),
        (gzip.compress(b"x", mtime=0)[:10] + b"\xff" * 20, "a.jsonl.gz"),
        (b"no such format", "a.parquet"),
        (b"", "a.parquet"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=re.escape(f"{tmp_path / name}: not a whole ")):
        list(read_records(tmp_path / name, "text"))


def test_a_damaged_page_of_parquet_is_named(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [str(n) * 50 for n in range(2000)])
    content = bytearray(path.read_bytes())
    content[len(content) // 3 : len(content) // 3 + 400] = b"\xff" * 400
    path.write_bytes(content)
    with pytest.raises(InputError, match="a.parquet: "):
        list(read_records(path, "text"))


@pytest.mark.parametrize(
    ("texts", "field", "named"),
    [
        (["x", None], "text", "row 2: text is None, expected a text"),
        ([b"x", b"y"], "text", "row 1: text is b'x', expected a text"),
        (["x"], "content", "has no column 'text', only other, content"),
    ],
)
def test_a_parquet_file_of_something_else_is_named(tmp_path, texts, field, named):
    path = write_parquet(tmp_path / "a.parquet", texts, field)
    with pytest.raises(InputError, match=re.escape(f"{path}: {named}")):
        list(read_records(path, "text"))


def test_what_parquet_needs_is_named(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", TEXTS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"needs the package pyarrow: pip install 'glm5-jax\[par"):
        list(read_records(path, "text"))
