import json
import sys

import pyarrow
import pytest
from pyarrow import parquet

from train.__main__ import main
from train.data import Data

SMALL = ["--vocab-size", "300", "--held-out", "0.2"]


@pytest.fixture
def folder(tmp_path):
    """Text of four kinds, and the empty kind."""
    texts = [f"line {number} of some text\n" * 5 for number in range(40)]
    for name in ("code", "empty", "tiny"):
        (tmp_path / name).mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "code" / f"{number}.py").write_text(text)
    (tmp_path / "tiny" / "only.py").write_text("x = 1\n")
    lines = "".join(json.dumps({"content": text, "id": n}) + "\n" for n, text in enumerate(texts))
    (tmp_path / "web.jsonl").write_text(lines)
    (tmp_path / "books.parquet").touch()
    parquet.write_table(pyarrow.table({"content": texts}), tmp_path / "books.parquet")
    return tmp_path


def prepare(folder, *options, data="data"):
    return main(["prepare", str(folder / data), *map(str, options), *SMALL])


def test_every_source_has_tokens_of_its_own(folder, capsys):
    web, books = (f"{name}={folder / path}" for name, path in
                  (("web", "web.jsonl"), ("books", "books.parquet")))  # fmt: skip
    options = ["--text", folder / "code", "--field", "content"]
    assert prepare(folder, *options, "--source", web, "--source", books) == 0
    lines = capsys.readouterr().out.splitlines()
    data = Data(folder / "data")
    assert data.sources == ("text", "web", "books")
    for source, line in zip(data.sources, lines, strict=True):
        assert line.startswith(f"{folder / 'data'}: {source}: 40 documents, ")
        assert f" {data.num_tokens('train', source):,} tokens to train on" in line
        assert data.num_documents("train", source) + data.num_documents("held_out", source) == 40
    assert data.num_tokens("train") == sum(data.num_tokens("train", s) for s in data.sources)


def test_a_source_may_have_several_paths(folder):
    sources = [f"all={folder / name}" for name in ("code", "tiny")]
    assert prepare(folder, "--source", sources[0], "--source", sources[1]) == 0
    data = Data(folder / "data")
    assert data.sources == ("all",)
    assert data.num_documents("train") + data.num_documents("held_out") == 41


def test_without_text_it_is_the_standard_library(folder):
    assert prepare(folder, "--max-bytes", "200000") == 0
    data = Data(folder / "data")
    assert data.sources == ("stdlib",)
    num_bytes = sum(
        data.bytes_per_token(split) * data.num_tokens(split) for split in ("train", "held_out")
    )
    assert 100_000 < num_bytes <= 200_000


def test_preparing_twice_gives_the_same_files(folder):
    for name in ("data", "again"):
        assert prepare(folder, "--text", folder / "code", data=name) == 0
    one, other = (
        {path.name: path.read_bytes() for path in (folder / name).iterdir()}
        for name in ("data", "again")
    )
    assert one == other and len(one) == 6


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--text", "{}/empty"], "{}/empty: no files *.py"),
        (["--text", "{}/tiny"], "source 'text' has 1 document, expected at least 2"),
        (["--text", "{}/code", "--source", "b={}/tiny"], "source 'b' has 1 document, expected"),
        (["--text", "{}/code", "--max-bytes", "9"], "no text of at most 9 bytes in 40 files"),
        (["--source", "a={}/code", "--source", "b={}/code/0.py"], "0.py: is in sources a and b"),
        (["--source", "a={}/nowhere"], "{}/nowhere: no such file or folder"),
        (["--text", "{}/web.jsonl"], "web.jsonl: line 1: text is None, expected a text"),
        (["--text", "{}/books.parquet"], "books.parquet: has no column 'text', only content"),
        (["--text", "{}/code", "--tokenizer", "{}/code"], "{}/code: has no tokenizer.json"),
    ],
)
def test_what_cannot_be_prepared_is_one_line_and_leaves_nothing(folder, capsys, options, named):
    before = sorted(folder.iterdir())
    assert prepare(folder, *(option.format(folder) for option in options)) == 2
    error = capsys.readouterr().err
    assert error.startswith("glm5-train: error: ") and error.count("\n") == 1
    assert named.format(folder) in error
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("source", ["web", "=path", "web=", "a/b=path", "../a=path", "-a=path"])
def test_a_source_without_a_name_and_a_path_is_refused(folder, capsys, source):
    with pytest.raises(SystemExit, match="2"):
        prepare(folder, f"--source={source}")
    assert f"--source: is '{source}', expected NAME=PATH" in capsys.readouterr().err


def test_text_that_is_not_utf_8_is_told_once(folder, capsys):
    (folder / "code" / "latin.py").write_bytes(b"# caf\xe9\n")
    assert prepare(folder, "--text", folder / "code") == 0
    error = capsys.readouterr().err
    assert error.startswith("1 file is not UTF-8 and left out, the first is ")
    assert error.endswith("latin.py\n") and error.count("\n") == 1


def test_text_needs_no_package_of_other_formats(folder, monkeypatch):
    for name in ("grain", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    assert prepare(folder, "--text", folder / "code") == 0
