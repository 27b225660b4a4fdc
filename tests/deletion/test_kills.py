"""Shards that are deleted as they are converted: never before what they held is on the disk."""

import json
import os
import pkgutil
import random
import shutil
import time
from pathlib import Path

import pytest

from convert.__main__ import main
from tests.damage import cut, flip_bit, one_line
from tests.deletion.runs import DELETE, shards
from tests.resuming.runs import begin, convert, params, workspace

SEEDS = 10


def test_a_conversion_killed_at_any_time_loses_nothing(original, whole, processes, tmp_path):
    """At some time after it began, or after so many shards are gone."""
    rng = random.Random(0)
    begun = time.perf_counter()
    timed = shutil.copytree(original, tmp_path / "source")
    assert main(["from-hf", str(timed), str(tmp_path / "timed"), DELETE]) == 0
    duration = time.perf_counter() - begun
    states = set()
    for seed in range(SEEDS):
        source = shutil.copytree(original, tmp_path / f"source-{seed}")
        destination = tmp_path / f"at-{seed}"
        arguments = ["from-hf", str(source), str(destination), DELETE, "--threads", "1"]
        while not destination.exists():
            left = rng.choice([5, 5, 4, 3, 2, 1])
            started = processes.Event()
            process = processes.Process(target=convert, args=(arguments, started))
            process.start()
            started.wait()
            while process.is_alive() and len(shards(source)) > left:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, duration if left == 5 else 0.03))
            process.kill()
            process.join()
            states.add(len(shards(source)))
            journal = workspace(destination) / "done-0.jsonl"
            if journal.exists():
                assert 5 - len(shards(source)) <= journal.read_bytes().count(b"\n")
            if rng.random() < 0.3:
                break
        if not destination.exists():
            assert main(arguments) == 0
        assert params(destination) == params(whole), seed
        assert not shards(source)
    assert not list(tmp_path.glob(".*.converting/content"))
    assert len(states - {0, 5}) > 1, "no kill fell between shards"


MOMENTS = {
    "before a stand-in": ("convert.deletion.Deletion._keep", 3),
    "before a stand-in has its name": ("pathlib.Path.replace", "stand-ins"),
    "before a shard goes": ("pathlib.Path.unlink", "00003-of-00005"),
    "before the tree": ("glm5_jax.tree_writer.TreeWriter.commit", 1),
    "before the last name": ("pathlib.Path.rename", "content"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_end_at_the_worst_moment_loses_nothing(source, whole, tmp_path, monkeypatch, moment):
    place, when = MOMENTS[moment]
    step, calls = pkgutil.resolve_name(place), []

    def killed(*args, **kwargs):
        calls.append(args)
        if len(calls) == when or (isinstance(when, str) and when in str(args[0])):
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    arguments = ["from-hf", str(source), str(tmp_path / "x"), DELETE, "--threads", "1"]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(place, killed)
        main(arguments)
    assert not (tmp_path / "x").exists()
    assert main(arguments) == 0
    assert params(tmp_path / "x") == params(whole)
    assert not shards(source)


def test_nothing_goes_before_what_was_made_of_it_is_on_the_disk(source, tmp_path, monkeypatch):
    synced, journal, gone = set(), [b""], []
    own = workspace(tmp_path / "x")
    fsync, unlink = os.fsync, Path.unlink

    def syncs(opened):
        fsync(opened)
        path = Path(os.readlink(f"/proc/self/fd/{opened}"))
        synced.add(path)
        if path.suffix == ".jsonl":
            journal.append(path.read_bytes())

    def unlinks(path, **kwargs):
        if path.parent == source and path.exists():
            lines = journal[-1].decode().splitlines()
            record = next(json.loads(line) for line in lines if f'"{path.name}"' in line)
            for leaf, position, _ in record["chunks"]:
                folder = own / "content" / "params.staging" / leaf
                assert {folder, folder / ".".join(map(str, position))} <= synced
            assert own / "stand-ins" in synced and (own / "stand-ins" / path.name).exists()
            assert any(each.name.startswith(f".{path.name}-") for each in synced)
            gone.append(path.name)
        unlink(path, **kwargs)
        held = [os.readlink(each) for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
        assert f"{path} (deleted)" not in held  # or the disk would keep it

    monkeypatch.setattr(os, "fsync", syncs)
    monkeypatch.setattr(Path, "unlink", unlinks)
    arguments = ["from-hf", str(source), str(tmp_path / "x"), DELETE, "--threads", "1"]
    assert main(arguments) == 0
    assert len(gone) == 5 and not shards(source)


def test_a_blob_that_went_before_its_link_is_no_loss(original, whole, tmp_path, monkeypatch):
    source, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    shutil.copytree(original, source)
    blobs.mkdir()
    for path in shards(source):
        path.rename(blobs / path.name)
        path.symlink_to(f"../../blobs/{path.name}")
    unlink = Path.unlink

    def killed(path, **kwargs):
        if path.parent == source:
            raise KeyboardInterrupt
        unlink(path, **kwargs)

    arguments = ["from-hf", str(source), str(tmp_path / "x"), DELETE, "--threads", "1"]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "unlink", killed)
        main(arguments)
    assert len(shards(source)) == 5 and len(list(blobs.iterdir())) == 4
    assert main(arguments) == 0
    assert params(tmp_path / "x") == params(whole)
    assert not shards(source) and not list(blobs.iterdir())


def test_a_damaged_journal_does_not_make_weights_of_what_is_gone(
    source, tmp_path, monkeypatch, capsys
):
    begin("from-hf", source, None, tmp_path / "x", monkeypatch, DELETE, "--threads", "1")
    journal = workspace(tmp_path / "x") / "done-0.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(b"{}\n{}\n")
    capsys.readouterr()
    assert main(["from-hf", str(source), str(tmp_path / "x"), "--threads", "1"]) == 2
    error = capsys.readouterr().err
    shard = source / "model-00001-of-00005.safetensors"
    assert f"{shard}: was deleted once it was converted, and is needed again" in error
    journal.write_bytes(whole)
    assert main(["from-hf", str(source), str(tmp_path / "x"), "--threads", "1"]) == 0


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_stand_in_does_not_make_weights(original, whole, seed, tmp_path, capsys):
    """Scales that another shard's weights need are nowhere else by then."""
    source = Path(shutil.copytree(original, tmp_path / "source"))
    arguments = ["from-hf", str(source), str(tmp_path / "x"), DELETE, "--threads", "1"]
    assert main([*arguments, "--process", "0/2"]) == 0
    rng = random.Random(seed)
    path = rng.choice(sorted((workspace(tmp_path / "x") / "stand-ins").iterdir()))
    sound = path.read_bytes()
    flip_bit(path, rng) if seed % 3 else cut(path, rng)
    if seed == 1:
        path.write_bytes(b"\xff" * 8 + sound[8:])
    one_line(capsys, arguments, f"{path}: damaged")
    assert len(shards(source)) == 2
    path.write_bytes(sound)
    assert main(arguments) == 0
    assert params(tmp_path / "x") == params(whole)
