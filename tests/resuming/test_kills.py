"""A conversion that is ended at any time goes on as if it had not been."""

import random
import time

import pytest

from convert.__main__ import main
from tests.resuming.runs import DIRECTIONS, command, contents, convert, workspace

SEEDS = 50


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
