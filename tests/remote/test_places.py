"""Places that are refused, files that are not what they should be, and credentials."""

import sys

import pytest

from convert.__main__ import main
from glm5_jax.remote import RemotePath
from tests.remote.unruly import Unruly


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_remote_file_is_trusted_no_more_than_a_local_one(url, source, length, capsys, tmp_path):
    name = "model-00002-of-00007.safetensors"
    Unruly().pipe_file(f"/bucket/model/{name}", (source / name).read_bytes()[:length])
    assert main(["from-hf", url, str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{url}/{name}: not a valid safetensors file" in error
    assert not list(tmp_path.iterdir())


def test_what_the_library_refuses_is_refused_of_a_remote_file_too(url, tmp_path, capsys):
    path = "/bucket/model/model-00002-of-00007.safetensors"
    data = bytearray(Unruly().cat_file(path))
    place = data.index(b'"format":"pt"')
    data[place : place + 13] = b'"format":"\\ud"'[:13]
    Unruly().pipe_file(path, bytes(data))
    assert main(["check", url]) == 2
    assert "not a valid safetensors file" in capsys.readouterr().err


def test_an_absent_shard_is_named(url, capsys):
    Unruly().rm("/bucket/model/model-00002-of-00007.safetensors")
    assert main(["check", url]) == 2
    said = f"{url}: model-00002-of-00007.safetensors missing, named by model.safetensors.index.json"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "named"),
    [
        ("unruly://bucket/nowhere", "unruly://bucket/nowhere: no such file or directory"),
        ("unruly://bucket/model/config.json", "config.json: is not a directory"),
        ("unruly://bucket", "unruly://bucket/config.json: no such file or directory"),
        ("nowhere://bucket/x", "nowhere://bucket/x: Protocol not known: nowhere"),
        ("gs://bucket/x", "gs://bucket/x: needs a package that is not installed: pip install 'glm"),
        ("abfs://bucket/x", "abfs://bucket/x: needs a package that is not installed"),
    ],
)
def test_a_place_that_cannot_be_read_is_one_line(url, place, named, tmp_path, capsys, monkeypatch):
    for package in ("gcsfs", "adlfs"):
        monkeypatch.setitem(sys.modules, package, None)
    for command in (["check", place], ["from-hf", place, str(tmp_path / "x")]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("glm5-convert: error: ")
        assert named in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["from-hf", "unruly://bucket/model", "gs://bucket/x"],
        ["to-hf", "gs://bucket/x", "x"],
        ["from-hf", "https://host/x?signature=secret", "x"],
        ["check", "filecache::gs://bucket/x"],
    ],
)
def test_a_url_that_cannot_be_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and "secret" not in error


def test_credentials_are_not_shown():
    shown = {
        "https://user:secret@host:80/models/x/": "https://host:80/models/x",
        "s3://key:secret@bucket/x": "s3://bucket/x",
        "hf://zai-org/GLM-5@v1.0/": "hf://zai-org/GLM-5@v1.0",
        "hf://zai-org/GLM-5@refs/pr/3/x": "hf://zai-org/GLM-5@refs/pr/3/x",
    }
    for url, expected in shown.items():
        assert str(RemotePath(url)) == expected
        assert str(RemotePath(url) / "config.json") == f"{expected}/config.json"
    revisions = [RemotePath(url).revision for url in shown]
    assert revisions == [None, None, "v1.0", "refs/pr/3"]
