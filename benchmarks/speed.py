"""Tokens per second beside transformers', with the same weights, and whether outputs are equal.

Every row is a program of each, in processes of their own that take turns. transformers runs with
the setting that is its fastest for the row. Needs the extra `parity`.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import ours, peer
from benchmarks.agreement import judged
from benchmarks.arguments import MISSED, add_cores, parser, run
from benchmarks.contest import Failed, Result, contender, output_of, take_turns
from benchmarks.output import RESULTS, commit, describe_machine, own_command, write_results
from benchmarks.peer import Setting
from benchmarks.workload import Work, checkpoint
from glm5_jax.errors import InputError
from glm5_jax.strict_json import read_json

_ROUNDS, _LAP_SECONDS = 5, 2.0
# Settings that take this many times as long as the best are not tried on longer rows.
_HOPELESS = 3.0
_PACKAGES = ("torch", "transformers")


class Row(NamedTuple):
    """A line of the table."""

    work: Work
    goal: float  # times transformers' tokens per second
    is_quick: bool = False

    @property
    def name(self) -> str:
        work = self.work
        return f"{work.kind} {work.dtype} {work.batch} {work.length}"


def _rows(kind: Any, dtype: str, batch: int, goals: dict[int, float], quick: int) -> list[Row]:
    return [
        Row(Work(kind, "bench", dtype, batch, length), goal, length <= quick)
        for length, goal in goals.items()
    ]


ROWS = [
    *_rows("prefill", "float32", 1, {512: 1.1, 2048: 3, 4096: 5, 8192: 8}, 2048),
    *_rows("prefill", "bfloat16", 1, {512: 2, 8192: 10}, 512),
    *_rows("decode", "float32", 1, {512: 5, 4096: 10, 16384: 60, 65536: 150}, 4096),
    *_rows("decode", "float32", 8, {4096: 35, 16384: 110}, 4096),
    *_rows("decode", "bfloat16", 1, {16384: 20}, 0),
    *_rows("decode", "bfloat16", 8, {16384: 30}, 0),
    *_rows("gradient", "float32", 1, {1024: 1.4, 2048: 2}, 1024),
]


def fastest_setting(work: Work, settings: list[Setting], cores: int) -> list[Setting]:
    """transformers' settings from the fastest on, without those that fail or are hopeless.

    Raises:
      Failed: all do.
    """
    seconds: dict[Setting, float] = {}
    for setting in settings:
        try:
            maker = (peer.make, checkpoint(work.preset), work, setting)
            with contender(*maker, cores=cores, huge_pages=work.trains) as each:
                seconds[setting] = min(each.run().seconds for _ in range(2))
        except Failed as failure:
            print(f"    {setting}: {failure!s:.100}", flush=True)
        else:
            print(f"    {setting}: {seconds[setting]:.3f} s", flush=True)
    if not seconds:
        raise Failed(f"transformers runs with none of its settings: {work}")
    best = min(seconds.values())
    return sorted(
        (setting for setting in seconds if seconds[setting] <= _HOPELESS * best),
        key=lambda setting: seconds[setting],
    )


def measure(row: Row, setting: Setting, cores: int) -> dict[str, Any]:
    """One line of the table."""
    work, where, at = row.work, checkpoint(row.work.preset), commit()
    results = take_turns(
        {"theirs": (peer.make, where, work, setting), "ours": (ours.make, where, work)},
        _ROUNDS,
        _LAP_SECONDS,
        cores,
        huge_pages=work.trains,
    )
    mine, theirs = results["ours"], results["theirs"]

    def expected(dtype: str) -> np.ndarray:
        # Its grouped_mm has no float64.
        plain = Setting() if dtype == "float64" else setting._replace(compiled=False)
        exact = work._replace(dtype=dtype)
        return output_of(peer.make, where, exact, plain, True, cores=cores)

    laps = list(zip(theirs.laps, mine.laps, strict=True))  # each two side by side
    return {
        **work._asdict(),
        "cores": cores,
        "commit": at,
        "setting": setting._asdict(),
        "goal": row.goal,
        "times": statistics.median(they.seconds / we.seconds for they, we in laps),
        "times_by_cpu": statistics.median(they.cpu_seconds / we.cpu_seconds for they, we in laps),
        **judged(work, mine.output, theirs.output, expected),
        "ours": _described(mine, work),
        "theirs": _described(theirs, work),
    }


def _described(result: Result, work: Work) -> dict[str, Any]:
    return {
        "tokens_per_second": work.num_tokens / result.seconds,
        "seconds": result.seconds,
        "cpu_seconds": result.cpu_seconds,
        "spread": result.spread,
        "seconds_to_prepare": result.seconds_to_prepare,
        "laps": [lap.seconds for lap in result.laps],
    }


def line(row: dict[str, Any]) -> str:
    """A row as a line of Markdown."""
    mine, theirs = row["ours"], row["theirs"]
    return (
        f"| {row['kind']} | {row['dtype']} | {row['batch']} | {row['length']:,} "
        f"| {theirs['tokens_per_second']:,.1f} | {mine['tokens_per_second']:,.1f} "
        f"| {row['times']:.3g} | {row['goal']:g} | {row['times_by_cpu']:.3g} "
        f"| {theirs['spread']:.2f}, {mine['spread']:.2f} "
        f"| {_shown_gaps(row)} "
        f"| {Setting(**row['setting'])} | {row['commit']} |"
    )


def _shown_gaps(row: dict[str, Any]) -> str:
    text = f"{row['gap_of_theirs']:.1e}, {row['gap']:.1e}"
    if "gaps_from_float64" in row:
        ours, theirs = row["gaps_from_float64"]
        text += f" (from float64 {theirs:.1e}, {ours:.1e})"
    return text if row["agrees"] else f"{text} (wrong)"


HEAD = [
    "| work | dtype | rows | tokens | transformers, tokens/s | here, tokens/s | times | goal "
    "| by CPU time | slowest over fastest lap: transformers', here | off by: transformers', here "
    "| setting of transformers | at |",
    "|" + "---|" * 13,
]


def _settings_of(kind: str, settings: dict[Work, Setting]) -> list[Setting]:
    """Those that were the fastest for some row of a kind of work."""
    return list(dict.fromkeys(settings[work] for work in settings if work.kind == kind))


def chosen_rows(only: str | None, full: bool) -> list[Row]:
    """The rows to measure: those whose name begins with `only`, without it all or the quick ones.

    Raises:
      InputError: there are none.
    """
    if only is None:
        return [row for row in ROWS if full or row.is_quick]
    if chosen := [row for row in ROWS if row.name.startswith(only)]:
        return chosen
    names = ", ".join(row.name for row in ROWS)
    raise InputError(f"--only {only!r:.80}: no row begins so, expected the beginning of {names}")


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and writes; MISSED if a goal is, 1 if outputs differ."""
    command_line = parser(__doc__)
    command_line.add_argument(
        "--full", action="store_true", help="all rows, and look for transformers' best settings"
    )
    command_line.add_argument("--only", help="rows whose work, dtype, rows and tokens begin so")
    add_cores(command_line)
    args = command_line.parse_args(arguments)
    rows = chosen_rows(args.only, args.full)
    known = json.loads((RESULTS / "speed.json").read_text())["rows"]
    before = _measured_here(args.results, args.cores) if args.results else {}
    settings = {Work.of(row): Setting(**row["setting"]) for row in (*known, *before.values())}
    useful: dict[tuple[str, str, int], list[Setting]] = {}
    print("\n".join(HEAD), flush=True)
    measured: dict[Work, dict[str, Any]] = {}
    failed = False
    for row in rows:
        try:
            if args.full or row.work not in settings:
                kind = row.work.kind
                alike = kind, row.work.dtype, row.work.batch
                of_kind = [] if args.full else _settings_of(kind, settings)
                tried = useful.get(alike) or of_kind or peer.settings(kind)
                useful[alike] = fastest_setting(row.work, tried, args.cores)
                settings[row.work] = useful[alike][0]
            result = measure(row, settings[row.work], args.cores)
        except Failed as failure:  # the other rows may take hours
            print(f"error: {row.name}: {failure}", file=sys.stderr)
            failed = True
            continue
        measured[row.work] = result | {"command": own_command("speed", arguments)}
        print(line(measured[row.work]), flush=True)
        if args.results:  # at once, as the next row may take an hour
            _write(args.results, before | measured)
    for work, result in measured.items():
        if not result["agrees"]:
            off = f"off by {result['gap']:.1e}, transformers' by {result['gap_of_theirs']:.1e}"
            print(f"error: outputs are {off}: {work}", file=sys.stderr)
            failed = True
    if failed:
        return 1
    return MISSED if any(each["times"] < each["goal"] for each in measured.values()) else 0


def _measured_here(folder: Path, cores: int) -> dict[Work, dict[str, Any]]:
    """The rows in a folder.

    Raises:
      InputError: they were measured on another machine, with other versions or other cores, so
        that new ones would be of no use beside them.
    """
    path = folder / "speed.json"
    if not path.exists():
        return {}
    report = read_json(path)
    before, now = report["machine"], describe_machine(*_PACKAGES)
    for name in sorted(now.keys() - {"commit"}):
        if before.get(name) != now[name]:
            raise InputError(
                f"{path}: was measured with {name} {before.get(name)}, here it is {now[name]}; "
                "expected another --results, or no such file, to measure anew"
            )
    for row in report["rows"]:
        if "agrees" not in row:
            raise InputError(f"{path}: is of an earlier version of this benchmark, expected none")
        if row["cores"] != cores:
            raise InputError(
                f"{path}: was measured with --cores {row['cores']}, expected the same, not {cores}"
            )
    return {Work.of(row): row for row in report["rows"]}


def _write(folder: Path, measured: dict[Work, dict[str, Any]]) -> None:
    rows = [measured[row.work] for row in ROWS if row.work in measured]
    table = [*HEAD, *map(line, rows)]
    # Rows have their own commands and commits.
    write_results(folder, "speed", own_command("speed", ()), rows, table, *_PACKAGES)
    draw(rows, folder / "speed.png")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Tokens per second by context, of one sequence in float32."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, all_axes = plt.subplots(1, 2, figsize=(10, 4))
    for axes, kind in zip(all_axes, ("prefill", "decode"), strict=True):
        shown = [row for row in rows if (row["kind"], row["dtype"]) == (kind, "float32")]
        if not (shown := [row for row in shown if row["batch"] == 1]):
            continue
        lengths = [row["length"] for row in shown]
        for who, name in (("ours", "glm5-jax"), ("theirs", "transformers 5.23")):
            speeds = [row[who]["tokens_per_second"] for row in shown]
            axes.plot(lengths, speeds, marker="o", label=name)
        axes.set(xscale="log", yscale="log", xlabel="tokens of context", title=kind)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.minorticks_off()
        axes.set_ylabel("tokens per second")
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run(main)
