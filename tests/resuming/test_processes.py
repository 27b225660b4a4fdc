"""Several processes convert one checkpoint, at once or one after the other."""

import shutil
import sys
import threading

import pytest

from convert import journal
from convert import workspace as workspaces
from convert.__main__ import main
from tests.resuming.runs import (
    DIRECTIONS,
    STEPS,
    begin,
    command,
    contents,
    convert_in_three,
    workspace,
)
from tests.together import run_together


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
    arguments = command(direction, source, native, tmp_path / "x")
    said = convert_in_three(processes, arguments, tmp_path.with_name("log"))
    assert contents(tmp_path / "x") == contents(whole[direction])
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
def test_connected_processes_begin_anew_together(source, native, whole, tmp_path, monkeypatch):
    begin("from-hf", source, native, tmp_path / "x", monkeypatch)
    arguments = command("from-hf", source, native, tmp_path / "x", "--restart")
    ended = run_together(*[("convert", *arguments)] * 3)
    assert [(each.status, each.errors) for each in ended] == [(0, "")] * 3
    assert contents(tmp_path / "x") == contents(whole["from-hf"])


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


def test_one_process_can_end_what_others_began(source, native, whole, tmp_path, capsys):
    for number in (0, 2):
        arguments = command("from-hf", source, native, tmp_path / "x", "--process", f"{number}/3")
        assert main(arguments) == 0
    assert not (tmp_path / "x").exists()
    assert main(command("from-hf", source, native, tmp_path / "x")) == 0
    assert "5 of 7 shards are done already" in capsys.readouterr().err
    assert contents(tmp_path / "x") == contents(whole["from-hf"])


@pytest.mark.parametrize("value", ["3/3", "1", "a/b", "0/0"])
def test_a_share_that_is_none_is_refused(source, tmp_path, capsys, value):
    with pytest.raises(SystemExit) as ended:
        main(["from-hf", str(source), str(tmp_path / "x"), "--process", value])
    assert ended.value.code == 2 and "expected I/N" in capsys.readouterr().err
