import pytest

from glm5_jax.errors import InputError
from train.corpus import read_documents, standard_library


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
    (root / "tests").mkdir()
    (root / "tests" / "skipped.py").write_text("x = 2\n")
    return root


def read(*roots, held_out=0.1, max_bytes=None):
    return list(read_documents(roots, "*.py", held_out, max_bytes))


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


def test_files_can_be_named_one_by_one(folder):
    assert len(read(folder / "part0" / "notes.txt")) == 1


def test_the_standard_library_is_there():
    documents = read(standard_library(), max_bytes=100_000)
    assert len(documents) > 3


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_nothing_to_read_is_an_error(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=name):
        read(tmp_path / name)
