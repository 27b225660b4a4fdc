"""What a conversion notes of its work: what is done is not done again, nor mixed with others."""

import io
import json
import os
import shutil
from pathlib import Path

import pytest

from convert import to_native
from convert.__main__ import main
from tests.resuming.runs import DIRECTIONS, begin, command, contents, fail_after, workspace


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_is_done_is_not_done_again(
    source, native, whole, direction, tmp_path, monkeypatch, capsys
):
    arguments = command(direction, source, native, tmp_path / "x", "--threads", "1")
    with monkeypatch.context() as patched:
        fail_after(patched, direction, 4)
        assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "/x: cannot be written: No space left on device; what is done is kept" in error
    assert not (tmp_path / "x").exists()
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("4 of ") and "are done already" in captured.err
    assert contents(tmp_path / "x") == contents(whole[direction])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_line_that_was_cut_off_is_written_again(
    source, native, whole, direction, tmp_path, monkeypatch
):
    arguments = command(direction, source, native, tmp_path / "x")
    with monkeypatch.context() as patched:
        fail_after(patched, direction, 3)
        assert main(arguments) == 2
    path = workspace(tmp_path / "x") / "done-0.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert main(arguments) == 0
    assert contents(tmp_path / "x") == contents(whole[direction])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_another_conversion_is_not_mixed_into_one_that_was_begun(
    source, native, whole, direction, tmp_path, monkeypatch, capsys
):
    option = {
        "from-hf": ["--float8-as", "bfloat16"],
        "to-hf": ["--dtype", "bfloat16"],
        "quantize": ["--to", "int8"],
    }[direction]
    begin(direction, source, native, tmp_path / "x", monkeypatch, *option)
    capsys.readouterr()
    assert main(command(direction, source, native, tmp_path / "x")) == 2
    error = capsys.readouterr().err
    assert "a conversion was begun with" in error and option[-1] in error and "--restart" in error
    assert main(command(direction, source, native, tmp_path / "x", "--restart")) == 0
    assert contents(tmp_path / "x") == contents(whole[direction])


def test_a_source_that_changed_meanwhile_is_named(source, native, tmp_path, monkeypatch, capsys):
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in source.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    begin("from-hf", changed, native, tmp_path / "x", monkeypatch)
    shard = changed / "model-00003-of-00007.safetensors"
    os.utime(shard, ns=(0, 0))
    capsys.readouterr()
    assert main(command("from-hf", changed, native, tmp_path / "x")) == 2
    assert shard.name in capsys.readouterr().err


def test_a_shard_that_changes_while_it_is_read_is_named(source, tmp_path, monkeypatch, capsys):
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in source.iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    shard = changed / "model-00003-of-00007.safetensors"
    original = to_native._Conversion._put

    def put(self, file, portion, data):
        os.utime(shard, ns=(0, 0))
        return original(self, file, portion, data)

    monkeypatch.setattr(to_native._Conversion, "_put", put)
    assert main(["from-hf", str(changed), str(tmp_path / "x")]) == 2
    assert f"{shard}: changed while it was read" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_line_that_does_not_fit_on_the_disk_spoils_no_other(
    source, native, whole, direction, tmp_path, monkeypatch, capsys
):
    """The disk is full when the third shard is noted, and has room again for a thread's next."""
    failed = []

    class Torn(io.FileIO):
        def write(self, data):
            if not failed and Path(self.name).read_bytes().count(b"\n") == 2:
                failed.append(super().write(data[:30]))
                raise OSError(28, "No space left on device")
            return super().write(data)

    def torn_open(path, *args, **kwargs):
        if path.name == "done-0.jsonl" and args == ("ab",):
            return Torn(path, "ab")
        return open(path, *args, **kwargs)

    arguments = command(direction, source, native, tmp_path / "x", "--threads", "3")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", torn_open)
        assert main(arguments) == 2
    assert failed == [30] and "No space left" in capsys.readouterr().err
    assert main(arguments) == 0
    assert contents(tmp_path / "x") == contents(whole[direction])


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("line", [b"{}", b"not JSON", b"[]", b'{"shard": "%s"}'])
def test_a_damaged_line_is_done_again(
    source, native, whole, direction, line, tmp_path, monkeypatch
):
    begin(direction, source, native, tmp_path / "x", monkeypatch, "--threads", "1")
    path = workspace(tmp_path / "x") / "done-0.jsonl"
    lines = path.read_bytes().splitlines()
    if b"%s" in line:
        line %= json.loads(lines[0])["shard"].encode()
    path.write_bytes(b"\n".join([line, *lines[1:]]) + b"\n")
    assert main(command(direction, source, native, tmp_path / "x", "--threads", "1")) == 0
    assert contents(tmp_path / "x") == contents(whole[direction])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_beginning_anew_leaves_nothing_of_what_was_before(
    source, native, whole, direction, tmp_path, monkeypatch
):
    begin(direction, source, native, tmp_path / "x", monkeypatch)
    folder = workspace(tmp_path / "x")
    (folder / "content" / "stale.safetensors").touch()
    (folder / "content" / "params").mkdir()
    (folder / "plan.json").unlink()  # as a kill in the midst of --restart may leave it
    assert main(command(direction, source, native, tmp_path / "x")) == 0
    assert contents(tmp_path / "x") == contents(whole[direction])


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("place", ["content/left over", "left over.safetensors.0"])
def test_what_is_written_over_needs_no_room(
    source, native, whole, direction, place, tmp_path, monkeypatch
):
    begin(direction, source, native, tmp_path / "x", monkeypatch, "--threads", "1")
    size = sum(len(data) for name, data in contents(whole[direction]).items())
    (workspace(tmp_path / "x") / place).write_bytes(bytes(size))
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: usage)
        arguments = command(direction, source, native, tmp_path / "x", "--threads", "1")
        assert main(arguments) == 0


def test_a_folder_that_exists_is_no_destination(source, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in (".", "/", str(tmp_path)):
        for options in ([], ["--plan"]):
            assert main(["from-hf", str(source), place, *options]) == 2
            assert "exists already" in capsys.readouterr().err


def test_locks_of_a_process_that_was_killed_are_no_part_of_it(
    source, native, whole, tmp_path, monkeypatch
):
    begin("from-hf", source, native, tmp_path / "x", monkeypatch)
    (workspace(tmp_path / "x") / "content/params.staging/head/.zarray.__lock").touch()
    assert main(command("from-hf", source, native, tmp_path / "x")) == 0
    assert contents(tmp_path / "x") == contents(whole["from-hf"])


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("memory", "threads"), [("1", "1"), ("10KB", "3"), ("1MiB", "8")])
def test_neither_memory_nor_threads_change_what_is_written(
    source, native, whole, direction, memory, threads, tmp_path, monkeypatch
):
    options = ["--memory", memory, "--threads", threads]
    assert main(command(direction, source, native, tmp_path / "x", *options)) == 0
    assert contents(tmp_path / "x") == contents(whole[direction])
