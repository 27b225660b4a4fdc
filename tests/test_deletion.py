"""Shards that are deleted as they are converted: never before what they held is on the disk."""

import json
import multiprocessing
import os
import pkgutil
import random
import re
import shutil
import time
from pathlib import Path

import fsspec
import pytest

from convert import to_native
from convert.__main__ import main
from convert.workspace import Workspace
from glm5_jax.published.safetensors import FIRST_READ
from tests.damage import cut, flip_bit, one_line
from tests.test_conversion_resumes import begin, contents, convert, workspace
from tests.tiny import TINY, float8_weights, random_weights, write_published

SEEDS = 10
DELETE = "--delete-source-shards"
# Shards of which a stand-in keeps a part only.
RAW = TINY | {"vocab_size": 193, "moe_intermediate_size": 96}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Float8, whose scales are in other shards, with copies of embedding and head."""
    weights, _ = float8_weights(random_weights(RAW))
    weights |= {
        "model.layers.7.embed_tokens.weight": weights["model.embed_tokens.weight"].copy(),
        "model.layers.7.shared_head.head.weight": weights["lm_head.weight"].copy(),
    }
    source = write_published(tmp_path_factory.mktemp("whole"), RAW, weights, num_shards=5)
    (source / "README.md").write_text("# A model")
    assert min(path.stat().st_size for path in shards(source)) > 1.2 * FIRST_READ
    return source


@pytest.fixture(scope="module")
def whole(original):
    native = original.with_name("native")
    assert main(["from-hf", str(original), str(native)]) == 0
    return native


@pytest.fixture
def source(original, tmp_path):
    """A copy of its own for a test, to be deleted."""
    return Path(shutil.copytree(original, tmp_path / "source"))


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_deletion"])
    return context


def shards(source):
    return sorted(source.glob("*.safetensors"))


def params(directory):
    """All but the record, which names the folder that was read."""
    said = ("conversion.json", "CONVERSION.md")
    return {name: data for name, data in contents(directory).items() if name not in said}


def test_shards_go_and_what_is_not_weights_stays(original, source, whole, tmp_path, capsys):
    assert main(["from-hf", str(source), str(tmp_path / "x"), DELETE]) == 0
    assert f"{source}: 5 shards were deleted" in capsys.readouterr().out
    assert params(tmp_path / "x") == params(whole)
    left = {path.name for path in original.iterdir()} - {path.name for path in shards(original)}
    assert {path.name for path in source.iterdir()} == left
    assert {path.name for path in tmp_path.iterdir()} == {"source", "x"}


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
    running = []
    for number in range(3):
        arguments = ["from-hf", str(source), str(tmp_path / "x"), DELETE]
        arguments += ["--process", f"{number}/3"]
        log = tmp_path.with_name(f"log-{number}")
        running.append(processes.Process(target=convert, args=(arguments, None, log)))
    for process in running:
        process.start()
    for process in running:
        process.join()
        assert process.exitcode == 0
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
