"""Which shards are deleted, by whom, and which are not."""

import os
import re
import shutil
from pathlib import Path

import fsspec
import pytest

from convert import to_native
from convert.__main__ import main
from convert.workspace import Workspace
from tests.deletion.runs import DELETE, RAW, shards
from tests.resuming.runs import begin, contents, convert_in_three, params, workspace
from tests.tiny import random_weights


def test_shards_go_and_what_is_not_weights_stays(original, source, whole, tmp_path, capsys):
    assert main(["from-hf", str(source), str(tmp_path / "x"), DELETE]) == 0
    assert f"{source}: 5 shards were deleted" in capsys.readouterr().out
    assert params(tmp_path / "x") == params(whole)
    left = {path.name for path in original.iterdir()} - {path.name for path in shards(original)}
    assert {path.name for path in source.iterdir()} == left
    assert {path.name for path in tmp_path.iterdir()} == {"source", "x"}


def test_what_was_begun_goes_on_with_and_without_deleting(source, whole, tmp_path, monkeypatch):
    arguments = ["from-hf", str(source), str(tmp_path / "x"), "--threads", "1"]
    begin("from-hf", source, None, tmp_path / "x", monkeypatch, "--threads", "1")
    assert len(shards(source)) == 5
    begin("from-hf", source, None, tmp_path / "x", monkeypatch, "--threads", "1", DELETE)
    assert len(shards(source)) == 1  # two and two are converted
    assert main([*arguments, "--plan"]) == 0
    assert main(arguments) == 0
    assert params(tmp_path / "x") == params(whole)
    assert len(shards(source)) == 1


def test_three_processes_that_delete_make_what_one_makes(source, whole, processes, tmp_path):
    arguments = ["from-hf", str(source), str(tmp_path / "x"), DELETE]
    convert_in_three(processes, arguments, tmp_path.with_name("log"))
    assert params(tmp_path / "x") == params(whole)
    assert not shards(source)


def test_a_shard_that_goes_between_a_look_and_a_read_is_read_from_its_stand_in(
    source, whole, tmp_path, monkeypatch
):
    """Another process does its whole share, and deletes it, when this one has opened all shards."""
    other = ["from-hf", str(source), str(tmp_path / "x"), DELETE, "--process", "1/2"]
    original = to_native.do_share

    def late(*args, **kwargs):
        with monkeypatch.context() as patched:
            patched.setattr(to_native, "do_share", original)
            assert main(other) == 0
        assert len(shards(source)) == 3
        original(*args, **kwargs)

    monkeypatch.setattr(to_native, "do_share", late)
    arguments = ["from-hf", str(source), str(tmp_path / "x"), DELETE, "--process", "0/2"]
    assert main(arguments) == 0
    assert params(tmp_path / "x") == params(whole)


def test_links_of_the_hugging_face_cache_go_with_their_blobs(original, whole, tmp_path):
    source, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    source.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(original.iterdir()):
        shutil.copyfile(path, blobs / str(number))
        (source / path.name).symlink_to(f"../../blobs/{number}")
    (blobs / "other").touch()
    begun = ["from-hf", str(source), str(tmp_path / "x"), DELETE]
    assert main([*begun, "--process", "0/2"]) == 0
    left = shards(source)
    assert len(left) == 2 and all(path.exists() for path in left)
    assert len(list(blobs.iterdir())) == len(list(source.iterdir())) + 1
    assert main(begun) == 0
    assert params(tmp_path / "x") == params(whole)
    assert not shards(source) and (source / "config.json").exists()
    assert len(list(blobs.iterdir())) == len(list(source.iterdir())) + 1


def test_beginning_anew_is_refused_when_shards_are_gone(
    source, whole, tmp_path, monkeypatch, capsys
):
    begin("from-hf", source, None, tmp_path / "x", monkeypatch, DELETE, "--threads", "1")
    arguments = ["from-hf", str(source), str(tmp_path / "x")]
    before = contents(workspace(tmp_path / "x"))
    capsys.readouterr()
    assert main([*arguments, "--restart"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "2 shards of the source were deleted" in error
    assert "model-00001-of-00005.safetensors" in error
    plan = workspace(tmp_path / "x") / "plan.json"
    plan.rename(tmp_path / "plan")
    assert main(arguments) == 2
    assert "2 shards of the source were deleted" in capsys.readouterr().err
    (tmp_path / "plan").rename(plan)
    assert contents(workspace(tmp_path / "x")) == before
    assert main(arguments) == 0
    assert params(tmp_path / "x") == params(whole)


def test_a_shard_that_changed_is_not_deleted(source, tmp_path, monkeypatch, capsys):
    finish = Workspace.finish
    changed = source / "model-00002-of-00005.safetensors"

    def finishes(self, record):
        finish(self, record)
        if record["shard"] == changed.name:
            os.utime(changed, ns=(0, 0))

    monkeypatch.setattr(Workspace, "finish", finishes)
    assert main(["from-hf", str(source), str(tmp_path / "x"), DELETE, "--threads", "1"]) == 2
    assert f"{changed}: changed while it was read" in capsys.readouterr().err
    assert changed.exists()


@pytest.mark.parametrize(
    ("place", "options", "named"),
    [
        ("memory://model", [], "memory://model: is not on this machine"),
        (None, ["--strict"], "expected it without --delete-source-shards"),
        (None, ["--layers", "0-3"], "expected neither with --delete-source-shards"),
        (None, ["--experts", "2"], "expected neither with --delete-source-shards"),
    ],
)
def test_what_cannot_be_deleted_is_refused(source, tmp_path, capsys, place, options, named):
    if place:
        monkey = fsspec.filesystem("memory")
        for path in source.iterdir():
            monkey.pipe_file(f"/model/{path.name}", path.read_bytes())
    for more in ([], ["--plan"]):
        arguments = ["from-hf", place or str(source), str(tmp_path / "x"), DELETE, *options, *more]
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and named in error
    assert len(shards(source)) == 5 and [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_folder_where_nothing_may_be_deleted_is_named_first(
    source, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != source)
    assert main(["from-hf", str(source), str(tmp_path / "x"), DELETE]) == 2
    assert f"{source}: nothing may be deleted there" in capsys.readouterr().err
    assert len(shards(source)) == 5 and [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_will_be_freed_counts_as_room(source, whole, tmp_path, monkeypatch, capsys):
    """With one shard in hand, room for what grows and for the largest one does."""
    size = sum(p.stat().st_size for p in whole.rglob("*") if re.fullmatch(r"[\d.]+", p.name))
    held = [path.stat().st_size for path in shards(source)]
    largest = max(held)
    arguments = ["from-hf", str(source), str(tmp_path / "x"), "--threads", "1"]

    def room(free):
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    grown = size - sum(held)
    assert grown > 0
    room(int(grown + 0.9 * largest))
    assert main([*arguments, DELETE]) == 2
    assert "bytes are to be written, where" in capsys.readouterr().err
    assert len(shards(source)) == 5
    room(int(grown + 1.05 * largest))
    assert main(arguments) == 2
    assert main([*arguments, DELETE]) == 0
    assert params(tmp_path / "x") == params(whole)


def test_files_of_torch_are_not_deleted(original, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    source = tmp_path / "source"
    source.mkdir()
    shutil.copyfile(original / "config.json", source / "config.json")
    weights = {name: torch.from_numpy(value) for name, value in random_weights(RAW).items()}
    torch.save(weights, source / "pytorch_model.bin")
    assert main(["from-hf", str(source), str(tmp_path / "x"), DELETE]) == 2
    assert "expected safetensors with --delete-source-shards" in capsys.readouterr().err
    assert (source / "pytorch_model.bin").exists() and not (tmp_path / "x").exists()
    assert main(["from-hf", str(source), str(tmp_path / "x")]) == 0
