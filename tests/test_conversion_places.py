"""What a conversion left that is damaged, where it may not write, and sources that change."""

import os
import random
import shutil

import numpy as np
import pytest

from convert import quantize, to_native, to_published
from convert.__main__ import main
from tests.damage import (
    DIRECTIONS,
    command,
    contents,
    cut,
    everything,
    flip_bit,
    make_checkpoints,
    one_line,
    refused,
    replace,
    whole,
)

SEEDS = 6
STEPS = {
    "from-hf": (to_native._Conversion, "_convert"),
    "to-hf": (to_published._Conversion, "_write"),
    "quantize": (quantize._Quantization, "_round"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_checkpoints(tmp_path_factory.mktemp("made"))


@pytest.fixture
def copy(made, tmp_path):
    """To change."""
    for name in ("source", "native"):
        shutil.copytree(made / name, tmp_path / "in" / name)
    return tmp_path / "in"


def begin(direction, made, destination):
    """Does a half; returns the folder of what is done."""
    assert main(command(direction, made, destination, "--process", "0/2")) == 0
    folder = destination.with_name(f".{destination.name}.converting")
    assert folder.exists() and not destination.exists()
    return folder


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_damaged_line_of_what_is_done_is_done_again(made, direction, seed, tmp_path, capsys):
    rng = random.Random(seed)
    journal = begin(direction, made, tmp_path / "x") / "done-0.jsonl"
    cut(journal, rng) if seed % 3 == 0 else flip_bit(journal, rng)
    assert main(command(direction, made, tmp_path / "x")) == 0
    assert contents(tmp_path / "x") == whole(direction, made)
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_content_that_is_no_longer_whole_is_made_again(made, direction, seed, tmp_path, capsys):
    rng = random.Random(seed)
    content = begin(direction, made, tmp_path / "x") / "content"
    held = sorted(path for path in content.rglob("*") if path.name[0] in "0123456789m")
    path = rng.choice([path for path in held if path.is_file() and path.stat().st_size])
    cut(path, rng) if seed % 2 else path.unlink()
    assert main(command(direction, made, tmp_path / "x")) == 0
    assert contents(tmp_path / "x") == whole(direction, made)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_damaged_plan_is_named_and_thrown_away_if_asked(made, direction, seed, tmp_path, capsys):
    rng = random.Random(seed)
    folder = begin(direction, made, tmp_path / "x")
    if seed == 0:
        replace(folder / "plan.json", "a pipe")
    elif seed % 3:
        flip_bit(folder / "plan.json", rng)
    else:
        cut(folder / "plan.json", rng)
    refused(capsys, tmp_path, command(direction, made, tmp_path / "x"), "--restart", "x")
    assert main(command(direction, made, tmp_path / "x", "--restart")) == 0
    assert contents(tmp_path / "x") == whole(direction, made)


def parent_is_a_loop(place):
    replace(place / "loop", "a loop of links")
    return place / "loop" / "x"


def workspace_is_a_file(place):
    (place / ".x.converting").touch()
    return place / "x"


def workspace_is_a_link(place):
    (place / "elsewhere").mkdir()
    (place / ".x.converting").symlink_to("elsewhere")
    return place / "x"


def dangling(place):
    (place / "x").symlink_to("nowhere")
    return place / "x"


def existing(place):
    (place / "x").write_text("precious")
    return place / "x"


def through_a_file(place):
    return existing(place) / "y"


PLACES = {
    "a file that is there": (existing, "x: exists already"),
    "a link to nowhere": (dangling, "x: exists already"),
    "a folder that is there": (lambda place: place, "exists already"),
    "through a file": (through_a_file, "leads through a file"),
    "through a loop of links": (parent_is_a_loop, "loop/x"),
    "where a file is in the way": (workspace_is_a_file, ".x.converting: is in the way"),
    "where a link is in the way": (workspace_is_a_link, ".x.converting: is in the way"),
    "a name that is too long": (lambda place: place / ("x" * 250), "xxx: cannot be written"),
    "where nothing can be written": (lambda place: "/proc/x", "/proc/x: cannot be written"),
    "a folder of the system": (lambda place: "/proc/y/x", "/proc/y"),
}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", PLACES)
def test_where_nothing_can_be_made_nothing_is(copy, direction, case, tmp_path, capsys):
    place, said = PLACES[case]
    refused(capsys, tmp_path, command(direction, copy, place(tmp_path)), said)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_nothing_is_made_within_the_source(copy, direction, tmp_path, capsys):
    arguments = command(direction, copy, tmp_path)
    arguments[2] = arguments[1] + "/x"
    refused(capsys, tmp_path, arguments, f"{arguments[2]}: lies within {arguments[1]}")


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_disk_that_is_too_small_is_named_before_anything_is_written(
    made, direction, tmp_path, capsys, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    arguments = command(direction, made, tmp_path / "x")
    refused(capsys, tmp_path, arguments, f"{tmp_path / 'x'}: ", "where 100,000 are free")


def after_a_shard(monkeypatch, direction, change, number=0):
    """Has something happen to the source when so many shards are done."""
    conversion, step = STEPS[direction]
    original = getattr(conversion, step)
    calls = []

    def do(self, *args):
        done = original(self, *args)
        if len(calls) == number:
            change()
        calls.append(1)
        return done

    monkeypatch.setattr(conversion, step, do)


def test_scales_that_change_after_their_file_was_read_are_noticed(
    copy, tmp_path, capsys, monkeypatch
):
    path = copy / "source" / "model-00001-of-00003.safetensors"

    def change():
        whole = bytearray(path.read_bytes())
        whole[-4:] = np.float32(7).tobytes()
        path.write_bytes(whole)

    after_a_shard(monkeypatch, "from-hf", change)
    arguments = command("from-hf", copy, tmp_path / "x", "--threads", "1")
    one_line(capsys, arguments, f"{path}: changed while it was read")
    assert not (tmp_path / "x").exists()
    one_line(capsys, arguments, path.name, "--restart")


@pytest.mark.parametrize("change", ["is cut off", "is deleted", "is another"])
def test_a_shard_that_is_not_there_any_more_is_noticed_if_it_matters(
    made, copy, change, tmp_path, capsys, monkeypatch
):
    path = copy / "source" / "model-00003-of-00003.safetensors"

    def do():
        if change == "is cut off":
            os.truncate(path, 1000)
        elif change == "is deleted":  # it is held open
            path.unlink()
        else:
            shutil.copy(path, path.with_name("new"))
            flip_bit(path.with_name("new"), random.Random(0))
            path.with_name("new").replace(path)

    after_a_shard(monkeypatch, "from-hf", do)
    arguments = command("from-hf", copy, tmp_path / "x", "--threads", "1")
    if change == "is cut off":
        one_line(capsys, arguments, f"{path}: ends at byte", "what is done is kept")
        assert not (tmp_path / "x").exists()
    else:
        assert main(arguments) == 0
        assert contents(tmp_path / "x") == whole("from-hf", made)


@pytest.mark.parametrize("direction", ["to-hf", "quantize"])
@pytest.mark.parametrize("change", ["manifest", "no manifest", "chunk", "no weights"])
def test_a_native_source_that_changes_meanwhile_is_noticed(
    copy, direction, change, tmp_path, capsys, monkeypatch
):
    native = copy / "native"

    def do():
        if change == "manifest":
            (native / "params" / "manifest.json").write_text("{}")
        elif change == "no manifest":
            (native / "params" / "manifest.json").unlink()
        elif change == "chunk":
            flip_bit(native / "params" / "mtp.norm" / "0", random.Random(0))
        else:
            shutil.rmtree(native / "params")

    after_a_shard(monkeypatch, direction, do)
    arguments = command(direction, copy, tmp_path / "x", "--threads", "1")
    said = {
        "manifest": f"{native}/params/manifest.json: changed while weights were converted",
        "no manifest": f"{native}/params/manifest.json: changed while weights were converted",
        "chunk": f"{native}/params: leaf mtp.norm, chunk 0: damaged",
        "no weights": f"{native}/params",
    }[change]
    one_line(capsys, arguments, said, "what is done is kept")
    assert not (tmp_path / "x").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"in", ".x.converting"}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("by", ["a folder", "a pipe", "a link to a device"])
def test_a_text_file_that_is_none_is_named(made, copy, direction, by, tmp_path, capsys):
    origin = copy / {"from-hf": "source"}.get(direction, "native")
    replace(origin / "tokenizer.json", by)
    before = everything(copy)
    arguments = command(direction, copy, tmp_path / "x")
    one_line(capsys, arguments, f"{origin / 'tokenizer.json'}: not a file")
    assert everything(copy) == before and not (tmp_path / "x").exists()
    replace(origin / "tokenizer.json", "a file")
    (origin / "tokenizer.json").write_text("{}")
    assert main(arguments) == 0
    assert contents(tmp_path / "x") == whole(direction, made)
