import json
import os

import pytest

from glm5_jax.errors import InputError
from train.corpus import STANDARD_LIBRARY_SKIP, find_files, read_documents, standard_library


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "texts"
    for number in range(200):
        path = root / f"part{number % 7}" / f"file{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {number}\n" + "x = 1\n" * (number % 5 + 1))
    (root / "part0" / "notes.txt").write_text("not code")
    (root / "part0" / "empty.py").write_text(" \n")
    (root / "part0" / "latin.py").write_bytes(b"# caf\xe9\n")
    (root / "part1" / "folder.py").mkdir()
    return root


def read(*roots, pattern="*.py", held_out=0.1, max_bytes=None, skip=()):
    return list(read_documents(find_files(roots, pattern, skip), held_out, max_bytes))


def test_every_file_with_text_is_read_once(folder):
    documents = read(folder)
    assert len({document.name for document in documents}) == len(documents) == 200
    assert all(document.text.startswith("# ") for document in documents)


def test_order_and_split_depend_on_names_only(folder, tmp_path):
    documents = read(folder)
    folder.rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").rename(tmp_path / "again")
    (tmp_path / "again").rename(folder)
    assert read(folder) == documents
    numbers = [int(document.name.rpartition("file")[2][:-3]) for document in documents]
    assert numbers != sorted(numbers)
    held_out = [document for document in documents if document.held_out]
    assert 8 <= len(held_out) <= 40
    more = {document.name for document in read(folder, held_out=0.3) if document.held_out}
    assert {document.name for document in held_out} < more


def test_no_more_is_read_than_asked_for(folder):
    documents = read(folder, max_bytes=500)
    assert 400 < sum(len(document.text.encode()) for document in documents) <= 500


def test_what_fits_in_is_read_after_what_does_not(tmp_path):
    for number in range(20):
        (tmp_path / f"{number}.py").write_text("x" * (1000 if number % 2 else 10))
    assert [len(document.text) for document in read(tmp_path, max_bytes=105)] == [10] * 10
    with pytest.raises(InputError, match=r"no text of at most 9 bytes in 20 files, the first is"):
        read(tmp_path, max_bytes=9)


def test_records_are_documents_by_their_lines(tmp_path):
    texts = [f"text {number}" for number in range(300)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in [*texts, "  "])
    (tmp_path / "a.jsonl").write_text(lines)
    documents = read(tmp_path / "a.jsonl")
    assert [document.text for document in documents] == texts
    assert [document.name for document in documents] == [f"a.jsonl:{n}" for n in range(1, 301)]
    assert 10 <= sum(document.held_out for document in documents) <= 60
    assert sum(document.size for document in documents) == len(lines) - len('{"text": "  "}\n')
    some = read(tmp_path / "a.jsonl", max_bytes=100)
    assert some == documents[:15]  # ten of 6 bytes, then of 7


def test_names_that_are_not_unicode_have_a_place(tmp_path):
    for name in (b"caf\xe9.py", b"na\xefve.py"):
        (tmp_path / os.fsdecode(name)).write_text("x")
    assert len(read(tmp_path)) == 2


def test_files_can_be_named_one_by_one(folder):
    assert len(read(folder / "part0" / "notes.txt")) == 1


def test_a_file_given_twice_is_read_once(folder):
    (folder / "part2" / "link.py").symlink_to(folder / "part0" / "file0.py")
    file = folder / "part0" / "file7.py"
    documents = read(folder, file, folder / "part0", folder / "part1" / ".." / "part0")
    assert len(documents) == 200
    assert len({document.text for document in documents if "file7.py" in document.name}) == 1


def test_folders_are_skipped_by_their_place_under_the_root(folder, tmp_path):
    root = tmp_path / "tests" / "site-packages"
    root.parent.mkdir()
    folder.rename(root)
    for name in STANDARD_LIBRARY_SKIP:
        (root / "part3" / name).mkdir()
        (root / "part3" / name / "more.py").write_text(f"# {name}\n")
    assert len(read(root)) == 200 + len(STANDARD_LIBRARY_SKIP)
    assert len(read(root, skip=STANDARD_LIBRARY_SKIP)) == 200


@pytest.mark.parametrize(
    ("more", "told"), [(0, "1 file is not UTF-8"), (2, "3 files are not UTF-8")]
)
def test_files_that_are_not_utf_8_are_told(folder, capsys, more, told):
    for number in range(more):
        (folder / f"latin{number}.py").write_bytes(b"# na\xefve\n")
    assert len(read(folder)) == 200
    error = capsys.readouterr().err
    assert told in error and "latin" in error and error.count("\n") == 1


def test_the_standard_library_is_there():
    documents = read(standard_library(), max_bytes=100_000, skip=STANDARD_LIBRARY_SKIP)
    assert len(documents) > 3


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_nothing_to_read_is_an_error(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=name):
        read(tmp_path / name)


@pytest.mark.parametrize("pattern", ["", "/x"])
def test_an_impossible_pattern_is_named(folder, pattern):
    with pytest.raises(InputError, match=r"--pattern is '.*', expected"):
        read(folder, pattern=pattern)
