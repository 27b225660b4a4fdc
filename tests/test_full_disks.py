"""A disk that is full at any moment of a conversion, and what is left beside it then."""

import contextlib
import errno
import logging
import os
import random
import resource
import sys

import pytest
from etils import epath

import glm5_jax.tree_writer
from convert import journal, to_published, workspace
from convert.__main__ import main
from glm5_jax import atomic
from tests.damage import (
    DIRECTIONS,
    command,
    contents,
    everything,
    limited,
    make_checkpoints,
    whole,
)

SEEDS = [
    (direction, seed)
    for direction in DIRECTIONS
    for seed in range(4 if direction == "quantize" else 20)
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_checkpoints(tmp_path_factory.mktemp("made"))


class _Disk:
    """Counts what is made, renamed and written in a folder; refuses it when there is no room.

    The interpreter calls `audit` before it opens a file, whoever asks for it. There is no way to
    take it back, so that it is told when to look.
    """

    folder: str | None = None
    count = 0
    full_at = -1
    stays_full = False

    def audit(self, event, args):
        if self.folder is None or event not in ("open", "os.mkdir", "os.rename"):
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & os.O_CREAT):
            return
        path = os.fsdecode(args[0]) if isinstance(args[0], str | bytes) else ""
        if path.startswith(self.folder):
            self.use(path)

    def use(self, path=None):
        self.count += 1
        if self.count == self.full_at or (self.stays_full and self.count > self.full_at >= 0):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *([path] if path else []))

    def write_all(self, file, data):
        """Writes a part only where the disk becomes full."""
        try:
            self.use()
        except OSError:
            file.write(data[: len(data) // 2])
            raise
        atomic.write_all(file, data)

    def sync(self, path):
        """Where file systems tell of what they have put off."""
        if not path.is_dir():
            self.use()
        atomic.sync(path)


DISK = _Disk()
sys.addaudithook(DISK.audit)


@contextlib.contextmanager
def disk(folder, monkeypatch, full_at=-1, stays_full=False):
    """A disk that has room for so many operations."""
    with monkeypatch.context() as patched:
        for module in (journal, to_published, glm5_jax.tree_writer):
            patched.setattr(module, "write_all", DISK.write_all)
        for module in (workspace, glm5_jax.tree_writer):
            patched.setattr(module, "sync", DISK.sync)
        DISK.count, DISK.full_at, DISK.stays_full = 0, full_at, stays_full
        DISK.folder = str(folder)
        try:
            yield
        finally:
            DISK.folder = None


@pytest.fixture(scope="module")
def counts(made, tmp_path_factory):
    """Of what is made, renamed and written in a conversion."""
    folder, found = tmp_path_factory.mktemp("counted"), {}
    for direction in DIRECTIONS:
        with pytest.MonkeyPatch.context() as patched, disk(folder, patched):
            assert main(command(direction, made, folder / direction)) == 0
        found[direction] = DISK.count
    return found


def ended_well(capsys, status, destination, said="No space left on device"):
    """What one line says, and what there is then beside the destination."""
    error = capsys.readouterr().err
    if status == 0:  # what was refused was not needed
        return
    assert status == 2 and error.startswith("glm5-convert: error: "), error
    assert error.count("\n") == 1 and str(destination) in error and said in error, error
    assert not destination.exists()
    held = {path.name for path in destination.parent.iterdir()}
    lines = destination.with_name(f".{destination.name}.converting") / "done-0.jsonl"
    assert ("what is done is kept" in error) == (held != set()), (error, held)
    assert held == set() or lines.read_bytes().count(b"\n") > 0


@pytest.mark.parametrize(("direction", "seed"), SEEDS)
def test_a_disk_that_is_full_at_any_write_is_one_line(
    made, counts, direction, seed, tmp_path, monkeypatch, capsys
):
    rng = random.Random(seed)
    folder = tmp_path / "out"
    folder.mkdir()
    arguments = command(direction, made, folder / "x", "--threads", rng.choice(["1", "3"]))
    before = everything(made)
    capsys.readouterr()
    with disk(folder, monkeypatch, rng.randrange(1, counts[direction] + 1), rng.random() < 0.5):
        status = main(arguments)
    ended_well(capsys, status, folder / "x")
    if status:
        assert main(arguments) == 0
    assert contents(folder / "x") == whole(direction, made)
    assert list(folder.iterdir()) == [folder / "x"]
    assert everything(made) == before


@pytest.mark.parametrize(("direction", "seed"), SEEDS)
def test_a_file_that_cannot_grow_is_one_line(made, direction, seed, tmp_path, capsys):
    """The system refuses to write beyond so many bytes of a file, whoever writes it."""
    largest = 100_000 if direction == "to-hf" else 26_000
    limit = int(largest ** random.Random(seed).random())
    arguments = command(direction, made, tmp_path / "x")
    capsys.readouterr()
    with limited(resource.RLIMIT_FSIZE, limit):
        status = main(arguments)
    ended_well(capsys, status, tmp_path / "x", "File too large")
    if status:
        assert main(arguments) == 0
    assert contents(tmp_path / "x") == whole(direction, made)
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_orbax_prints_nothing_of_its_own_of_a_full_disk(made, tmp_path, monkeypatch, capsys):
    """Its threads log the errors that it raises, with where they come from."""
    logged = []
    handler = logging.Handler()
    handler.emit = logged.append
    monkeypatch.setattr(logging.getLogger("absl"), "handlers", [handler])
    original = epath.Path.write_text

    def full(path, *args, **kwargs):
        if path.name == "_METADATA":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(path, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(type(epath.Path(tmp_path)), "write_text", full)
        status = main(command("from-hf", made, tmp_path / "x"))
    ended_well(capsys, status, tmp_path / "x")
    assert status == 2 and not logged
