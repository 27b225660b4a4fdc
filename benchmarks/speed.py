"""Tokens per second beside transformers', with the same weights, and whether outputs are equal.

Every row is a program of each, in processes of their own that take turns. transformers runs with
the setting that is its fastest for the row. Needs the extra `parity`.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import ours, peer
from benchmarks.contest import Failed, Result, contender, take_turns
from benchmarks.output import commit, write_results
from benchmarks.peer import Setting
from benchmarks.workload import Work, checkpoint

_ROUNDS, _LAP_SECONDS = 5, 2.0
_MANY_SECONDS, _FEW_ROUNDS = 20.0, 3  # a run of transformers that takes longer is done less often
# Settings that take this many times as long as the best are not tried on longer rows.
_HOPELESS = 3.0


class Row(NamedTuple):
    """A line of the table."""

    work: Work
    goal: float  # times transformers' tokens per second
    is_quick: bool = False


def _rows(kind: Any, dtype: str, batch: int, goals: dict[int, float], quick: int) -> list[Row]:
    return [
        Row(Work(kind, "bench", dtype, batch, length), goal, length <= quick)
        for length, goal in goals.items()
    ]


ROWS = [
    *_rows("prefill", "float32", 1, {512: 1.1, 2048: 3, 4096: 5, 8192: 8}, 2048),
    *_rows("prefill", "bfloat16", 1, {512: 2, 8192: 10}, 512),
    *_rows("decode", "float32", 1, {512: 5, 4096: 10, 16384: 60, 65536: 150}, 16384),
    *_rows("decode", "float32", 8, {4096: 35, 16384: 110}, 4096),
    *_rows("decode", "bfloat16", 1, {16384: 20}, 0),
    *_rows("decode", "bfloat16", 8, {16384: 30}, 0),
    *_rows("train", "float32", 1, {1024: 1.4, 2048: 2}, 1024),
]


def fastest_setting(work: Work, settings: list[Setting], cores: int | None) -> list[Setting]:
    """transformers' settings from the fastest on, without those that fail or are hopeless."""
    seconds: dict[Setting, float] = {}
    for setting in settings:
        try:
            with contender(peer.make, checkpoint(work.preset), work, setting, cores=cores) as each:
                seconds[setting] = min(each.run().seconds for _ in range(2))
        except Failed as failure:
            print(f"    {setting}: {failure!s:.100}", flush=True)
        else:
            print(f"    {setting}: {seconds[setting]:.3f} s", flush=True)
    best = min(seconds.values())
    return sorted(
        (setting for setting in seconds if seconds[setting] <= _HOPELESS * best),
        key=lambda setting: seconds[setting],
    )


def gap(work: Work, ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference between outputs, relative to the largest output."""
    if work.kind == "decode":
        tokens_BM, ours = ours[..., 0].astype(int), ours[..., 1]
        total_B1 = np.log(np.sum(np.exp(theirs.astype(np.float64)), axis=-1, keepdims=True))
        theirs = np.take_along_axis(theirs - total_B1, tokens_BM, axis=-1)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def measure(row: Row, setting: Setting, cores: int | None) -> dict[str, Any]:
    """One line of the table."""
    work, where = row.work, checkpoint(row.work.preset)
    with contender(peer.make, where, work, setting, cores=cores) as each:
        rounds = _FEW_ROUNDS if each.run().seconds > _MANY_SECONDS else _ROUNDS
    results = take_turns(
        {"theirs": (peer.make, where, work, setting), "ours": (ours.make, where, work)},
        rounds,
        _LAP_SECONDS,
        cores,
    )
    mine, theirs = results["ours"], results["theirs"]
    return {
        **work._asdict(),
        "cores": cores or os.cpu_count(),
        "commit": commit(),
        "setting": setting._asdict(),
        "goal": row.goal,
        "times": theirs.seconds / mine.seconds,
        "times_by_cpu": theirs.cpu_seconds / mine.cpu_seconds,
        "gap": gap(work, mine.output, theirs.output),
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
        f"| {row['times']:.1f} | {row['goal']:g} | {row['times_by_cpu']:.1f} "
        f"| {theirs['spread']:.2f}, {mine['spread']:.2f} | {row['gap']:.1e} "
        f"| {Setting(**row['setting'])} |"
    )


HEAD = [
    "| work | dtype | rows | tokens | transformers, tokens/s | here, tokens/s | times | goal "
    "| by CPU time | slowest over fastest lap | difference | setting of transformers |",
    "|" + "---|" * 12,
]


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and writes; fails if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="all rows, and transformers' settings")
    parser.add_argument("--only", help="rows whose kind, dtype, rows and tokens begin with this")
    parser.add_argument("--cores", type=int, help="how many to use; all unless given")
    parser.add_argument(
        "--results", type=Path, help="folder with results: rows that are measured replace its own"
    )
    args = parser.parse_args(arguments)
    known = _known((args.results or Path(__file__).parent / "results") / "speed.json")
    settings: dict[tuple[str, str, int], list[Setting]] = {}
    print("\n".join(HEAD), flush=True)
    measured: dict[Work, dict[str, Any]] = {}
    for row in ROWS:
        name = " ".join(map(str, row.work._replace(preset="")))
        name = " ".join(name.split())
        if not (args.full or row.is_quick) or not name.startswith(args.only or ""):
            continue
        setting = Setting(**known[row.work]["setting"]) if row.work in known else Setting()
        if args.full:
            of = (row.work.kind, row.work.dtype, row.work.batch)
            tried = settings.get(of, peer.settings(row.work.kind))
            settings[of] = fastest_setting(row.work, tried, args.cores)
            setting = settings[of][0]
        measured[row.work] = measure(row, setting, args.cores)
        print(line(measured[row.work]), flush=True)
        if args.results:  # at once, as the next row may take an hour
            _write(args.results, known | measured)
    return 1 if any(row["times"] < row["goal"] for row in measured.values()) else 0


def _write(folder: Path, measured: dict[Work, dict[str, Any]]) -> None:
    rows = [measured[row.work] for row in ROWS if row.work in measured]
    command = "python -m benchmarks.speed --full --results benchmarks/results"
    table = [*HEAD, *map(line, rows)]
    write_results(folder, "speed", command, rows, table, "torch", "transformers")
    draw(rows, folder / "speed.png")


def _known(results: Path) -> dict[Work, dict[str, Any]]:
    """Rows that were measured before."""
    if not results.exists():
        return {}
    rows = json.loads(results.read_text())["rows"]
    return {Work(*(row[field] for field in Work._fields)): row for row in rows}


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
    sys.exit(main())
