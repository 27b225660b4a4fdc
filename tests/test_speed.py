import json
import os
import resource
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import agreement, contest, plans, processors, readme, scaling, speed
from benchmarks.agreement import gaps, judged
from benchmarks.arguments import run
from benchmarks.contest import Failed, Program, contender, take_turns
from benchmarks.output import RESULTS, describe_machine, own_command
from benchmarks.peer import Setting
from benchmarks.workload import Work, checkpoint
from glm5_jax.errors import InputError


def squares(length):
    values = np.arange(length)
    return Program(lambda: values * values, lambda: values[:3] ** 2)


def cores():
    return Program(list, lambda: np.array(len(os.sched_getaffinity(0))))


def settings_of_jax():
    import jax

    wide, platforms = jax.config.jax_enable_x64, jax.config.jax_platforms
    return Program(list, lambda: np.array([platforms, str(wide), os.environ.get("XLA_FLAGS", "")]))


def large(num_bytes):
    return Program(lambda: np.ones(num_bytes, np.uint8)[:1], lambda: np.zeros(1))


def page_faults(num_bytes):
    """How many it takes to fill memory."""

    def count():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        memory = bytearray(num_bytes)
        for page in range(0, num_bytes, 4096):
            memory[page] = 1
        return np.array(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

    return Program(list, count)


def forgetful():
    """Takes long after it had to wait."""
    ended = [time.monotonic()]

    def run():
        time.sleep(0.5 if time.monotonic() - ended[0] > 0.4 else 0.001)
        ended[0] = time.monotonic()

    return Program(run, lambda: np.zeros(1))


def slow_at_first():
    """As a program that compiles once more after its output."""
    times = iter([0.5])
    return Program(lambda: time.sleep(next(times, 0.001)), lambda: np.zeros(1))


def broken():
    raise ValueError("no such program")


def dying():
    os._exit(3)


def test_programs_take_turns_in_processes_of_their_own():
    found = take_turns({"few": (squares, 3), "many": (squares, 30_000)}, rounds=4, lap_seconds=0.01)
    np.testing.assert_array_equal(found["few"].output, [0, 1, 4])
    for each in found.values():
        assert len(each.laps) == 4 and 0 < each.seconds < 0.1 and each.spread >= 1


def test_the_first_run_of_a_turn_is_not_counted():
    found = take_turns({"one": (forgetful,), "other": (forgetful,)}, rounds=3, lap_seconds=0.2)
    for each in found.values():
        assert all(lap.seconds < 0.1 for lap in each.laps)


def test_what_a_program_compiles_late_does_not_make_its_runs_long(monkeypatch):
    monkeypatch.setattr(contest, "_LONG_SECONDS", 0.2)
    found = take_turns({"one": (slow_at_first,)}, rounds=4, lap_seconds=0.02)
    assert len(found["one"].laps) == 4


def test_a_program_may_be_given_fewer_cores():
    with contender(cores, cores=1) as one:
        assert one.output == 1


def test_a_program_has_its_own_settings_of_jax(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    monkeypatch.setenv("XLA_FLAGS", "--anything")
    with contender(settings_of_jax) as one:
        assert one.output.tolist() == ["cpu", "False", ""]


def test_the_peak_is_that_of_one_run():
    with contender(large, 2**28) as each:
        high = each.peak()
    with contender(large, 2**20) as each:
        assert 2**27 < high - each.peak() < 2**29


def test_memory_may_come_in_huge_pages(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=1")
    kernel = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not kernel.exists() or "[madvise]" not in kernel.read_text():
        pytest.skip("the kernel does not leave it to programs")
    library, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    if library != "glibc" or tuple(map(int, version.split("."))) < (2, 35):
        pytest.skip("malloc does not ask for it")
    with (
        contender(page_faults, 2**26) as small,
        contender(page_faults, 2**26, huge_pages=True) as huge,
    ):
        assert huge.output < 2**12 < 2**14 <= small.output
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.arena_max=1"


@pytest.mark.parametrize(("make", "why"), [(broken, "no such program"), (dying, "died")])
def test_a_program_that_cannot_be_made_says_why(make, why):
    with pytest.raises(Failed, match=why), contender(make):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "length", "most"),
    [("prefill", 60, 1e-5), ("decode", 200, 1e-5), ("gradient", 60, 1e-4)],
)
def test_both_programs_compute_the_same(tmp_path, kind, length, most):
    pytest.importorskip("torch")
    from benchmarks import ours, peer

    work = Work(kind, "demo", "float32", 2, length)
    where = checkpoint(work.preset, tmp_path)
    outputs = []
    for make, *more in ((ours.make,), (peer.make, peer.Setting())):
        with contender(make, where, work, *more) as each:
            outputs.append(each.output)
    mine, theirs = outputs
    assert gaps(work, mine, theirs, theirs)[0] < most


def test_a_difference_between_outputs_is_seen():
    logits = np.linspace(-2, 2, 5, dtype=np.float32)[None]
    both = np.stack([logits, logits], axis=1)
    off = both + np.array([0, 0.5], np.float32)[:, None]  # at one position of two
    work = Work("prefill", "demo", "float32", 1, 60)
    assert gaps(work, off, both, both) == pytest.approx((0.125, 0))
    assert gaps(work, both, off, both) == pytest.approx((0, 0.125))


def test_a_difference_between_likelihoods_is_seen():
    logits = np.linspace(-2, 2, 5, dtype=np.float32)[None]
    told = np.array([[[4, -0.5], [0, -4.5]]])  # the tokens, and their logarithms
    of_logits = logits - np.log(np.exp(logits).sum())
    off = max(abs(-0.5 - of_logits[0, 4]), abs(-4.5 - of_logits[0, 0])) / -of_logits[0, 0]
    work = Work("decode", "demo", "float32", 1, 60)
    assert gaps(work, told, logits + 1, logits) == pytest.approx((off, 0), rel=1e-5, abs=1e-7)


def one_row(value):
    """Of one position, whose largest output is 1."""
    return np.array([[[1, value]]], np.float32)


@pytest.mark.parametrize(
    ("ours", "theirs", "agrees"),
    [(0.01, 0, True), (0.2, 0.15, True), (0.3, 0.15, False), (np.nan, 0, False)],
)
def test_bfloat16_may_be_as_far_off_as_transformers(ours, theirs, agrees):
    work = Work("prefill", "demo", "bfloat16", 1, 60)
    found = judged(work, one_row(ours), one_row(theirs), {"float32": one_row(0)}.__getitem__)
    assert found["agrees"] == agrees
    assert found["gap"] == pytest.approx(ours, nan_ok=True)
    assert found["gap_of_theirs"] == pytest.approx(theirs)


@pytest.mark.parametrize(
    ("ours", "in_float32", "in_float64", "agrees"),
    [
        (1e-6, 0, None, True),  # near: float64 is not asked for
        (0.06, 0.01, 0.03, True),  # off by 0.03, transformers by 0.02
        (0.07, 0.01, 0.03, False),
        (0.05, 0.01, 0.01, False),  # transformers is right
        (0.05, 0.01, 0.05, True),  # this program is
        (np.nan, 0, 0.5, False),
    ],
)
def test_float32_is_near_or_as_near_to_float64_as_transformers(
    ours, in_float32, in_float64, agrees
):
    work = Work("prefill", "demo", "float32", 1, 60)
    expected = {"float32": one_row(in_float32)}
    if in_float64 is not None:
        expected["float64"] = one_row(in_float64)
    theirs = one_row(0.9)  # as fast as it can be, which is not what this program is judged by
    found = judged(work, one_row(ours), theirs, expected.__getitem__)
    assert found["agrees"] == agrees
    assert ("gaps_from_float64" in found) == (in_float64 is not None)


def test_a_row_tells_by_what_it_was_judged():
    row = json.loads((RESULTS / "speed.json").read_text())["rows"][0]
    row |= {"gap": 0.03, "gap_of_theirs": 0.1, "agrees": True, "gaps_from_float64": (0.02, 0.01)}
    assert "| 1.0e-01, 3.0e-02 (from float64 1.0e-02, 2.0e-02) |" in speed.line(row)
    assert "2.0e-02) (wrong) |" in speed.line(row | {"agrees": False})


def test_the_readme_has_the_tables_that_were_measured():
    text = (readme.ROOT / "README.md").read_text()
    assert "<!-- benchmarks/results/speed.md -->" in text
    assert readme.with_tables(text) == text
    assert (RESULTS / "processors.md").read_text() == processors.table()


@pytest.mark.parametrize(
    ("benchmark", "arguments", "why"),
    [
        (speed, ["--cores", "0"], "argument --cores: is '0', expected an integer from 1 to"),
        (speed, ["--cores", "4096"], "argument --cores: is '4096', expected an integer from 1 to"),
        (speed, ["--only", "prefil float"], "--only 'prefil float': no row begins so, expected"),
        (plans, ["--only", "v7:1x1"], "--only 'v7:1x1': in no plan's command, expected part of"),
        (speed, ["--results", __file__], "test_speed.py', expected a folder that can be written"),
        (scaling, ["--preset", "glm-6"], "glm-6"),
    ],
)
def test_what_cannot_be_measured_is_one_line(benchmark, arguments, why, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [benchmark.__name__, *arguments])
    with pytest.raises(SystemExit) as end:
        run(benchmark.main)
    said = capsys.readouterr().err
    assert end.value.code == 2 and why in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("times", "agrees", "status"), [(99, True, 0), (0.5, True, 3), (99, False, 1)]
)
def test_the_status_tells_a_missed_goal_from_a_wrong_output(times, agrees, status, monkeypatch):
    side = {"tokens_per_second": 1.0, "spread": 1.0}

    def measured(row, setting, cores):
        sides = {"ours": side, "theirs": side, "setting": setting._asdict()}
        numbers = {"goal": row.goal, "times": times, "times_by_cpu": times, "commit": "1234567"}
        outputs = {"gap": 0.1, "gap_of_theirs": 0.0, "agrees": agrees}
        return row.work._asdict() | sides | numbers | outputs

    monkeypatch.setattr(speed, "measure", measured)
    assert speed.main(["--only", "prefill float32 1 512"]) == status


def test_a_row_that_fails_does_not_end_the_others(monkeypatch, capsys):
    tried = []

    def fail(row, setting, cores):
        tried.append(row.name)
        raise Failed("out of memory")

    monkeypatch.setattr(speed, "measure", fail)
    monkeypatch.setattr(speed, "fastest_setting", lambda *_: [Setting()])
    assert speed.main(["--only", "prefill float32"]) == 1
    assert len(tried) == 4 and "prefill float32 1 512: out of memory" in capsys.readouterr().err


@pytest.fixture
def earlier(tmp_path):
    """Writes rows as if they were measured here, but for some facts; returns the file."""

    def write(cores=1, is_new=True, **machine):
        row = {**Work("prefill", "bench", "float32", 1, 512)._asdict(), "cores": cores}
        row |= {"setting": Setting("sdpa")._asdict(), **({"agrees": True} if is_new else {})}
        report = {"machine": describe_machine(*speed._PACKAGES) | machine, "rows": [row]}
        (tmp_path / "speed.json").write_text(json.dumps(report))
        return tmp_path / "speed.json"

    return write


@pytest.mark.parametrize(
    ("different", "why"),
    [
        ({"processor": "abacus"}, "was measured with processor abacus, here it is"),
        ({"torch": "1.0"}, "was measured with torch 1.0, here it is"),
        ({"cores": 3}, "was measured with --cores 3, expected the same, not 1"),
        ({"is_new": False}, "is of an earlier version of this benchmark"),
        (None, "speed.json: not valid JSON"),
    ],
)
def test_rows_that_cannot_stand_beside_new_ones_are_kept(earlier, different, why, monkeypatch):
    path = earlier(**(different or {}))
    if different is None:
        path.write_text('{"rows": [')
    before = path.read_text()
    monkeypatch.setattr(speed, "measure", None)  # not to be called
    with pytest.raises(InputError, match=why):
        speed.main(["--cores", "1", "--only", "prefill", "--results", str(path.parent)])
    assert path.read_text() == before


def test_a_row_has_the_setting_that_it_had_in_the_same_folder(earlier, monkeypatch):
    tried = []

    def fail(row, setting, cores):
        tried.append(setting)
        raise Failed("enough")

    monkeypatch.setattr(speed, "measure", fail)
    folder = str(earlier().parent)
    only = ["--cores", "1", "--only", "prefill float32 1 512"]
    assert speed.main([*only, "--results", folder]) == speed.main(only) == 1
    known = json.loads((RESULTS / "speed.json").read_text())["rows"][0]
    assert tried == [Setting("sdpa"), Setting(**known["setting"])] and tried[0] != tried[1]


@pytest.mark.slow
def test_float64_is_had_of_a_row_whose_setting_has_none(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(agreement, "_CLOSE", -1)
    monkeypatch.setattr(speed, "_LAP_SECONDS", 0.1)
    row = speed.Row(Work("prefill", "demo", "float32", 1, 300), goal=1)
    found = speed.measure(row, Setting("eager", "grouped_mm"), cores=1)
    assert all(0 < gap < 0.5 for gap in found["gaps_from_float64"])


def test_without_float64_a_row_is_wrong_and_not_lost(capsys):
    def expected(dtype):
        if dtype == "float64":
            raise Failed("out of memory")
        return one_row(0)

    work = Work("prefill", "demo", "float32", 1, 60)
    found = judged(work, one_row(0.1), one_row(0), expected)
    assert not found["agrees"] and found["gap"] == pytest.approx(0.1)
    assert "float64: out of memory" in capsys.readouterr().err


def test_a_checkpoint_of_another_preset_is_made_anew(tmp_path):
    where = checkpoint("demo", tmp_path)
    stale = json.loads((where / "config.json").read_text()) | {"hidden_size": 1}
    (where / "config.json").write_text(json.dumps(stale))
    assert checkpoint("demo", tmp_path) == where
    assert json.loads((where / "config.json").read_text())["hidden_size"] != 1


def test_of_equal_scores_the_peer_is_made_to_select_the_first():
    torch = pytest.importorskip("torch")
    from benchmarks.peer import _first_of_equal

    scores = torch.tensor([[0.0, 2.0, 0.0, -1.0, 0.0, 2.0]])
    found = _first_of_equal(scores, 4, dim=-1)
    assert found.indices.tolist() == [[1, 5, 0, 2]] and found.values.tolist() == [[2, 2, 0, 0]]


def test_a_command_is_told_but_for_where_results_go():
    given = ["--only", "decode float32", "--results", "somewhere", "--cores", "2"]
    told = "python -m benchmarks.speed --only 'decode float32' --cores 2"
    assert own_command("speed", given) == told
    assert own_command("speed", ["--results=somewhere", *given[:2], *given[4:]]) == told
    assert own_command("speed", []) == "python -m benchmarks.speed"
