"""A conversion that is ended at any time goes on as if it had not been."""

import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from convert import journal, quantize, to_native, to_published
from convert import workspace as workspaces
from convert.__main__ import main
from tests.tiny import TINY, float8_weights, random_weights, write_published
from tests.together import run_together

SEEDS = 50
# What is made, and what does one of the shards that a record is kept of.
STEPS = {
    "from-hf": (to_native._Conversion, "_convert"),
    "to-hf": (to_published._Conversion, "_write"),
    "quantize": (quantize._Quantization, "_round"),
}
DIRECTIONS = list(STEPS)
PUBLISHED = ["--shard-size", "200KB"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    weights, _ = float8_weights(random_weights(TINY))
    return write_published(tmp_path_factory.mktemp("published"), TINY, weights, num_shards=7)


@pytest.fixture(scope="module")
def native(source, tmp_path_factory):
    """Converted from the source without an interruption, and back."""
    folder = tmp_path_factory.mktemp("native") / "from-hf"
    assert main(["from-hf", str(source), str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def whole(native):
    back = native.with_name("to-hf")
    assert main(["to-hf", str(native), str(back), *PUBLISHED]) == 0
    rounded = native.with_name("quantize")
    assert main(["quantize", str(native), str(rounded), "--to", "int4"]) == 0
    return {"from-hf": native, "to-hf": back, "quantize": rounded}


def command(direction, source, native, destination, *options):
    if direction == "from-hf":
        return ["from-hf", str(source), str(destination), *options]
    if direction == "to-hf":
        return ["to-hf", str(native), str(destination), *PUBLISHED, *options]
    return ["quantize", str(native), str(destination), "--to", "int4", *options]


def contents(directory):
    """Every file's bytes but Orbax's, which have a time in them."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name not in ("_CHECKPOINT_METADATA", "commit_success.txt")
    }


def workspace(destination):
    return destination.with_name(f".{destination.name}.converting")


def convert(arguments, started=None, log=os.devnull, limit=None):
    """The command in a process of its own, which says what it says into a file.

    Args:
      limit: of bytes in a file; the system refuses to write more.
    """
    with Path(log).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if started is not None:
        started.set()
    sys.exit(main(arguments))


@pytest.fixture(scope="module")
def processes():
    """Makes processes that have imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_conversion_resumes"])
    return context


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_conversion_killed_at_any_time_goes_on(
    source, native, whole, direction, processes, tmp_path
):
    rng = random.Random(direction)
    begun = time.perf_counter()
    assert main(command(direction, source, native, tmp_path / "timed")) == 0
    duration = time.perf_counter() - begun
    states = set()
    for seed in range(SEEDS):
        destination = tmp_path / f"at-{seed}"
        arguments = command(direction, source, native, destination)
        while True:  # until it comes through; the later, the fewer kills
            started = processes.Event()
            process = processes.Process(target=convert, args=(arguments, started))
            process.start()
            started.wait()
            time.sleep(rng.uniform(0, 1.5 * duration))
            process.kill()
            process.join()
            lines = workspace(destination) / "done-0.jsonl"
            states.add(lines.read_bytes().count(b"\n") if lines.exists() else None)
            if destination.exists() or rng.random() < 0.5:
                break
        if not destination.exists():
            assert main(arguments) == 0
        assert contents(destination) == contents(whole[direction]), seed
    assert not list(tmp_path.glob(".*.converting/content"))
    assert len(states - {None, 0}) > 1, "no kill fell between shards"


@pytest.mark.parametrize(
    ("direction", "moment"),
    [
        ("from-hf", "orbax.checkpoint.Checkpointer.save"),
        ("from-hf", "glm5_jax.tree_writer.TreeWriter.commit"),
        ("from-hf", "convert.workspace.sync"),
        ("from-hf", "shutil.rmtree"),
        ("to-hf", "convert.to_published.write_text_files"),
        ("to-hf", "convert.workspace.sync"),
        ("to-hf", "shutil.rmtree"),
        ("quantize", "glm5_jax.tree_writer.TreeWriter.commit"),
        ("quantize", "shutil.rmtree"),
    ],
)
def test_a_kill_while_it_is_finished_does_no_harm(
    source, native, whole, direction, moment, tmp_path, monkeypatch
):
    def killed(*_, **__):
        raise KeyboardInterrupt

    arguments = command(direction, source, native, tmp_path / "x")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(moment, killed)
        main(arguments)
    status = 2 if (tmp_path / "x").exists() else 0
    assert main(arguments) == status
    assert contents(tmp_path / "x") == contents(whole[direction])
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


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


def fail_after(monkeypatch, direction, count):
    """Has a full disk after so many shards."""
    conversion, step = STEPS[direction]
    original = getattr(conversion, step)
    calls = []

    def limited(*args):
        calls.append(1)
        if len(calls) > count:
            raise OSError(28, "No space left on device")
        return original(*args)

    monkeypatch.setattr(conversion, step, limited)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("limit", [1000, 3000, 9000, 17_000, 50_000, 120_000])
def test_a_write_that_fails_is_one_line_and_gone_on_with(
    source, native, whole, direction, limit, processes, tmp_path
):
    """The system refuses to write beyond so many bytes of a file, as it does on a full disk."""
    arguments = command(direction, source, native, tmp_path / "x")
    log = tmp_path / "log"
    process = processes.Process(target=convert, args=(arguments, None, log, limit))
    process.start()
    process.join()
    error = log.read_text()
    assert process.exitcode in (0, 2)
    if process.exitcode:
        assert not (tmp_path / "x").exists()
        assert error.startswith("glm5-convert: error: ") and str(tmp_path / "x") in error
        assert error.count("\n") == 1 and "File too large" in error
        assert main(arguments) == 0
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


def begin(direction, source, native, destination, monkeypatch, *options):
    with monkeypatch.context() as patched:
        fail_after(patched, direction, 2)
        assert main(command(direction, source, native, destination, *options)) == 2


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
def test_two_runs_into_one_destination_are_refused(
    source, native, whole, direction, tmp_path, monkeypatch, capsys
):
    conversion, step = STEPS[direction]
    original = getattr(conversion, step)
    inside, go_on = threading.Event(), threading.Event()

    def waits(*args):
        inside.set()
        assert go_on.wait(60)
        return original(*args)

    monkeypatch.setattr(conversion, step, waits)
    arguments = command(direction, source, native, tmp_path / "x")
    first = threading.Thread(target=main, args=(arguments,))
    first.start()
    assert inside.wait(60)
    assert main(arguments) == 2
    assert "another process is converting to it" in capsys.readouterr().err
    go_on.set()
    first.join()
    assert contents(tmp_path / "x") == contents(whole[direction])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_three_processes_make_what_one_makes(source, native, whole, direction, processes, tmp_path):
    running = []
    for number in range(3):
        arguments = command(direction, source, native, tmp_path / "x", "--process", f"{number}/3")
        log = tmp_path.with_name(f"log-{number}")
        running.append(processes.Process(target=convert, args=(arguments, None, log)))
    for process in running:
        process.start()
    for process in running:
        process.join()
        assert process.exitcode == 0
    assert contents(tmp_path / "x") == contents(whole[direction])
    said = [tmp_path.with_name(f"log-{number}").read_text() for number in range(3)]
    assert sum("tensors, " in text for text in said) == 1
    assert sum("has done its share" in text for text in said) == 2
    assert not any("done already" in text for text in said)
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


@pytest.mark.slow
def test_connected_processes_share_the_work(source, native, whole, tmp_path):
    """And tell once what they made, whoever ended last."""
    for direction in DIRECTIONS:
        arguments = command(direction, source, native, tmp_path / direction)
        ended = run_together(*[("convert", *arguments)] * 3)
        assert [(each.status, each.errors) for each in ended] == [(0, "")] * 3
        assert "tensors, " in ended[0].output and not ended[1].output and not ended[2].output
        assert contents(tmp_path / direction) == contents(whole[direction])
        assert not workspace(tmp_path / direction).exists()


@pytest.mark.slow
def test_connected_processes_take_no_other_share(source, tmp_path):
    arguments = ["from-hf", source, tmp_path / "x", "--process", "0/2"]
    ended = run_together(*[("convert", *arguments)] * 2)
    assert {each.status for each in ended} == {2}
    assert "--process is 0/2, expected none" in "".join(each.errors for each in ended)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_process_that_comes_late_finds_it_made(
    source, native, whole, direction, tmp_path, monkeypatch, capsys
):
    """Its share is done, and all else too, before it looks."""
    module = sys.modules[STEPS[direction][0].__module__]
    original = module.do_share
    other = command(direction, source, native, tmp_path / "x", "--process", "1/2")

    def slow(*args, **kwargs):
        original(*args, **kwargs)
        with monkeypatch.context() as patched:
            patched.setattr(module, "do_share", original)
            assert main(other) == 0

    monkeypatch.setattr(module, "do_share", slow)
    arguments = command(direction, source, native, tmp_path / "x", "--process", "0/2")
    assert main(arguments) == 0
    assert "another has made it" in capsys.readouterr().out
    assert contents(tmp_path / "x") == contents(whole[direction])


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
def test_nothing_is_thrown_away_that_another_process_works_on(
    source, native, whole, direction, tmp_path, monkeypatch, capsys
):
    module = sys.modules[STEPS[direction][0].__module__]
    original = module.do_share
    other = command(direction, source, native, tmp_path / "x", "--process", "1/2")

    def slow(*args, **kwargs):
        with monkeypatch.context() as patched:
            patched.setattr(module, "do_share", original)
            assert main([*other, "--restart"]) == 2
        original(*args, **kwargs)

    arguments = command(direction, source, native, tmp_path / "x", "--process", "0/2")
    with monkeypatch.context() as patched:
        patched.setattr(module, "do_share", slow)
        assert main(arguments) == 0
    assert "another process is converting to it" in capsys.readouterr().err
    assert main(other) == 0
    assert contents(tmp_path / "x") == contents(whole[direction])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_folder_that_goes_while_it_is_looked_at_is_no_fault(
    source, native, whole, direction, tmp_path, monkeypatch, capsys
):
    """Another process has finished, and removes its files between being listed and being read."""
    listed, remove = journal.journals, shutil.rmtree
    arguments = command(direction, source, native, tmp_path / "x", "--process", "0/2")
    other = command(direction, source, native, tmp_path / "x", "--process", "1/2")
    assert main(arguments) == 0

    def gone(directory):
        found = listed(directory)
        if (tmp_path / "x").exists():
            remove(directory, ignore_errors=True)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(journal, "journals", gone)
        patched.setattr(workspaces.shutil, "rmtree", lambda *_, **__: None)
        assert main(other) == 0
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
def test_what_is_written_over_needs_no_room(
    source, native, whole, direction, tmp_path, monkeypatch
):
    begin(direction, source, native, tmp_path / "x", monkeypatch, "--threads", "1")
    size = sum(len(data) for name, data in contents(whole[direction]).items())
    content = workspace(tmp_path / "x") / "content"
    (content / "left over").write_bytes(bytes(size))
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


def test_one_process_can_end_what_others_began(source, native, whole, tmp_path, capsys):
    for number in (0, 2):
        arguments = command("from-hf", source, native, tmp_path / "x", "--process", f"{number}/3")
        assert main(arguments) == 0
    assert not (tmp_path / "x").exists()
    assert main(command("from-hf", source, native, tmp_path / "x")) == 0
    assert "5 of 7 shards are done already" in capsys.readouterr().err
    assert contents(tmp_path / "x") == contents(whole["from-hf"])


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("memory", "threads"), [("1", "1"), ("10KB", "3"), ("1MiB", "8")])
def test_neither_memory_nor_threads_change_what_is_written(
    source, native, whole, direction, memory, threads, tmp_path, monkeypatch
):
    options = ["--memory", memory, "--threads", threads]
    assert main(command(direction, source, native, tmp_path / "x", *options)) == 0
    assert contents(tmp_path / "x") == contents(whole[direction])


@pytest.mark.parametrize("value", ["3/3", "1", "a/b", "0/0"])
def test_a_share_that_is_none_is_refused(source, tmp_path, capsys, value):
    with pytest.raises(SystemExit) as ended:
        main(["from-hf", str(source), str(tmp_path / "x"), "--process", value])
    assert ended.value.code == 2 and "expected I/N" in capsys.readouterr().err
