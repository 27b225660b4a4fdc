"""Checkpoints that are read over the network: as from a disk, whatever the network does."""

import functools
import http.server
import json
import re
import socket
import sys
import threading
import time

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from convert.__main__ import main
from glm5_jax import remote
from glm5_jax.published import storage
from glm5_jax.remote import RemotePath
from tests.test_conversion_resumes import contents
from tests.tiny import TINY, float8_weights, random_weights, write_published

SMALL = {"README.md": "# A model", "LICENSE": "MIT", "tokenizer.json": "{}"}


class Unruly(MemoryFileSystem):
    """Files in memory, with whatever a test has happen to requests."""

    protocol = "unruly"
    store, pseudo_dirs = {}, [""]
    before = None  # is called with the path and the bounds of a part, or with the path alone
    after = None  # makes of the part what is sent

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("unruly://"))

    def info(self, path, **kwargs):
        if Unruly.before:
            Unruly.before(path)
        return super().info(path, **kwargs)

    def cat_file(self, path, start=None, end=None, **kwargs):
        if Unruly.before:
            Unruly.before(path, start, end)
        data = super().cat_file(path, start, end)
        return Unruly.after(path, start, end, data) if Unruly.after else data


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("remote") / "x"
    source = write_published(folder, TINY, random_weights(TINY), num_shards=7)
    for name, text in SMALL.items():
        (source / name).write_text(text)
    return source


@pytest.fixture(scope="module")
def native(source):
    native = source.with_name("native")
    assert main(["from-hf", str(source), str(native)]) == 0
    return native


@pytest.fixture
def url(source, monkeypatch):
    """The source in memory; what fails is tried again at once."""
    fsspec.register_implementation("unruly", Unruly, clobber=True)
    monkeypatch.setattr(Unruly, "store", {})
    monkeypatch.setattr(Unruly, "before", None)
    monkeypatch.setattr(Unruly, "after", None)
    monkeypatch.setattr(remote, "_PAUSES", (0, 0, 0, 0))
    upload(source)
    return "unruly://bucket/model"


def upload(source, only=""):
    for path in source.iterdir():
        if path.name.startswith(only):
            Unruly().pipe_file(f"/bucket/model/{path.name}", path.read_bytes())


def params(directory):
    """The weights and their config, and the small files beside them."""
    said = ("conversion.json", "CONVERSION.md")  # of what it was made
    return {name: data for name, data in contents(directory).items() if name not in said}


def is_shard(path):
    return path.endswith(".safetensors")


def test_a_remote_checkpoint_becomes_what_a_local_one_does(url, source, native, tmp_path, capsys):
    stored = {path: file.getvalue() for path, file in Unruly.store.items()}
    destination = tmp_path / "x"
    assert main(["check", url]) == 0
    assert main(["from-hf", url, str(destination), "--plan"]) == 0
    assert main(["from-hf", url, str(destination)]) == 0
    assert params(destination) == params(native)
    assert {name: (destination / name).read_text() for name in SMALL} == SMALL
    assert main(["verify", str(destination), "--against", url]) == 0
    for pair in ((url, destination), (native, url), (url, source)):
        assert main(["diff", *map(str, pair)]) == 0
    assert capsys.readouterr().err == ""
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert {path: file.getvalue() for path, file in Unruly.store.items()} == stored
    record = json.loads((destination / "conversion.json").read_text())
    assert record["source"] == url
    assert record["read"] == json.loads((native / "conversion.json").read_text())["read"]


def test_a_network_that_fails_now_and_then_changes_nothing(url, native, tmp_path, monkeypatch):
    failed, slept = set(), []

    def before(*request):
        for number in range(4):
            if (number, *request) not in failed:
                failed.add((number, *request))
                raise (ConnectionResetError("reset"), TimeoutError, OSError(5, "I/O"))[number % 3]

    monkeypatch.setattr(Unruly, "before", before)
    monkeypatch.setattr(remote, "_PAUSES", (1, 2, 4, 8))
    monkeypatch.setattr(remote.time, "sleep", slept.append)
    assert main(["from-hf", url, str(tmp_path / "x"), "--threads", "1"]) == 0
    assert params(tmp_path / "x") == params(native)
    assert slept[:8] == [1, 2, 4, 8] * 2


def test_a_network_that_is_gone_is_one_line_and_gone_on_with(
    url, native, tmp_path, monkeypatch, capsys
):
    begun = []

    def before(path, *bounds):
        if is_shard(path) and bounds and bounds[0] > 0:
            begun.append(path)
            if len(set(begun)) > 3:
                raise ConnectionResetError(104, "Connection reset by peer")

    arguments = ["from-hf", url, str(tmp_path / "x"), "--threads", "1"]
    with monkeypatch.context() as patched:
        patched.setattr(Unruly, "before", before)
        assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Connection reset by peer; what is done is kept" in error
    assert f"{url}/model-00004-of-00007.safetensors: " in error
    assert main(arguments) == 0
    assert "3 of 7 shards are done already" in capsys.readouterr().err
    assert params(tmp_path / "x") == params(native)


def test_what_cannot_pass_is_not_tried_again(url, tmp_path, monkeypatch, capsys):
    asked = []

    def before(path, *bounds):
        if is_shard(path):
            asked.append(path)
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Unruly, "before", before)
    assert main(["from-hf", url, str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.count("Permission denied") == 7
    assert f"{url}/model-00001-of-00007.safetensors: Permission denied" in error
    assert len(asked) == len(set(asked)) == 7
    assert not list(tmp_path.iterdir())


def test_replies_that_are_cut_short_are_asked_for_again(url, native, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Unruly,
        "after",
        lambda path, start, end, data: data[: -(-len(data) // 2)] if start is not None else data,
    )
    assert main(["from-hf", url, str(tmp_path / "x")]) == 0
    assert params(tmp_path / "x") == params(native)


@pytest.mark.parametrize(
    ("after", "named"),
    [
        (lambda path, start, end, data: b"" if start else data, "ends at byte"),
        (lambda path, start, end, data: data + b"x", "does the server serve parts of files"),
    ],
)
def test_replies_of_another_length_are_named(url, tmp_path, monkeypatch, capsys, after, named):
    monkeypatch.setattr(
        Unruly, "after", lambda path, *rest: after(path, *rest) if is_shard(path) else rest[-1]
    )
    assert main(["from-hf", url, str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and named in error and f"{url}/model-0000" in error
    assert not list(tmp_path.iterdir())


def test_a_source_that_changes_between_two_runs_is_named(
    url, source, native, tmp_path, monkeypatch, capsys
):
    arguments = ["from-hf", url, str(tmp_path / "x")]
    assert main([*arguments, "--process", "0/2"]) == 0
    upload(source, only="model-00003")
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "a conversion was begun with shards model-00003-of-00007.safetensors" in error
    assert main([*arguments, "--restart"]) == 0
    assert params(tmp_path / "x") == params(native)


def test_a_source_that_changes_while_it_is_read_is_named(
    url, source, tmp_path, monkeypatch, capsys
):
    def before(path, *bounds):
        if is_shard(path) and bounds and bounds[0] > 0:
            monkeypatch.setattr(Unruly, "before", None)
            upload(source, only=path.rpartition("/")[2])

    monkeypatch.setattr(Unruly, "before", before)
    assert main(["from-hf", url, str(tmp_path / "x"), "--threads", "1"]) == 2
    assert "model-00001-of-00007.safetensors: changed while it was read" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_headers_are_fetched_several_at_a_time_by_two_requests_each(url, monkeypatch):
    together = threading.Barrier(7, timeout=60)
    asked = []

    def before(path, *bounds):
        if is_shard(path) and path.endswith("of-00007.safetensors"):
            asked.append(path)
            if bounds:
                together.wait()

    monkeypatch.setattr(Unruly, "before", before)
    assert main(["check", url]) == 0
    assert len(asked) == 14


def test_what_is_read_at_a_time_stays_within_the_memory(url, native, tmp_path, monkeypatch):
    lock, held, most = threading.Lock(), {}, [0]

    def before(path, *bounds):
        size = bounds[1] - bounds[0] if bounds and bounds[1] else 0
        # Blocks come beside that, one for each file; and what files start with, before.
        if size > 4096 and bounds[1] != 2**17:
            with lock:
                held[threading.get_ident()] = size
                if len(held) > 1:
                    most.append(sum(held.values()))

    def after(path, start, end, data):
        time.sleep(0.002)  # so that others ask, too
        with lock:
            held.pop(threading.get_ident(), None)
        return data

    monkeypatch.setattr(storage, "_BLOCK", 4096)
    monkeypatch.setattr(Unruly, "before", before)
    monkeypatch.setattr(Unruly, "after", after)
    options = ["--memory", "60KB", "--threads", "8"]
    assert main(["from-hf", url, str(tmp_path / "x"), *options]) == 0
    assert params(tmp_path / "x") == params(native)
    assert len(most) > 10 and max(most) <= 30_000  # and as much again where a reply is joined


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


def test_float8_finds_its_scales_over_the_network_by_few_requests(tmp_path, url, monkeypatch):
    requests = []
    weights, _ = float8_weights(random_weights(TINY))
    source = write_published(tmp_path / "float8", TINY, weights, num_shards=5)
    Unruly.store.clear()
    upload(source)
    monkeypatch.setattr(Unruly, "before", lambda *request: requests.append(request))
    for number in range(3):
        share = ["--process", f"{number}/3", "--threads", "1"]
        assert main(["from-hf", url, str(tmp_path / "x"), *share]) == 0
    num_scales = sum(name.endswith("_scale_inv") for name in weights)
    assert num_scales > 150 and len(requests) < num_scales
    assert main(["from-hf", str(source), str(tmp_path / "y")]) == 0
    assert params(tmp_path / "x") == params(tmp_path / "y")


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


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, and parts of its files if it is to."""

    parts = True
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match is None or not self.parts:
            return super().do_GET()
        with open(self.translate_path(self.path), "rb") as file:
            file.seek(int(match[1]))
            data = file.read(int(match[2]) + 1 - int(match[1]))
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def served(source, monkeypatch):
    monkeypatch.setattr(remote, "_PAUSES", (0, 0))
    handler = functools.partial(Handler, directory=source)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.handle_error = lambda *_: None  # of clients that go before they have heard it all
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_checkpoint_is_read_over_http(served, native, tmp_path, capsys):
    url = f"http://somebody:secret@{served}"
    assert main(["from-hf", url, str(tmp_path / "x")]) == 0
    assert params(tmp_path / "x") == params(native)
    said = (tmp_path / "x" / "conversion.json").read_text() + "".join(capsys.readouterr())
    assert f'"http://{served}"' in said and "secret" not in said
    assert main(["check", f"http://{served}/nowhere"]) == 2
    expected = f"http://{served}/nowhere/config.json: no such file or directory\n"
    assert capsys.readouterr().err.endswith(expected)


def test_a_server_that_sends_no_parts_is_named(served, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Handler, "parts", False)
    assert main(["from-hf", f"http://{served}", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "doesn't appear to support range requests" in error


def test_a_server_that_cannot_be_reached_is_named(monkeypatch, capsys):
    monkeypatch.setattr(remote, "_PAUSES", (0, 0))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert main(["check", f"http://127.0.0.1:{port}/x"]) == 2
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1 and f"http://127.0.0.1:{port}/x/params: Connect call failed" in error
    )
