"""Checkpoints that are read over the network: as from a disk, whatever the network does."""

import json
import threading
import time

import pytest

from convert.__main__ import main
from glm5_jax import remote
from glm5_jax.published import storage
from tests.remote.unruly import SMALL, Unruly, is_shard, upload
from tests.resuming.runs import params
from tests.tiny import TINY, float8_weights, random_weights, write_published


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
