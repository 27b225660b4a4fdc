"""Time per token as the context grows: one step of the engine, its cache filled at random."""

from typing import Any

from benchmarks import ours
from benchmarks.arguments import MISSED, parser, run
from benchmarks.contest import take_turns
from benchmarks.output import own_command, write_results
from benchmarks.workload import Work, checkpoint

_PRESETS = {"bench": "every layer has an indexer", "bench-shared": "one layer in four has one"}
_CONTEXTS = (1024, 4096, 16384, 65536)
_ROUNDS, _LAP_SECONDS = 7, 0.5
# Largest ratio of the time at 64k to that at 4k, of one row in float32.
_GOALS = {"bench": 2.5, "bench-shared": 1.5}


def measure(preset: str, dtype: str, batch: int) -> list[dict[str, Any]]:
    """Milliseconds per step at every context: medians of laps that take turns."""
    works = {str(context): Work("decode", preset, dtype, batch, context) for context in _CONTEXTS}
    makers = {name: (ours.make, checkpoint(preset), work) for name, work in works.items()}
    results = take_turns(makers, _ROUNDS, _LAP_SECONDS)
    return [
        {
            **works[name]._asdict(),
            "milliseconds": round(1e3 * result.seconds, 2),
            "cpu_milliseconds": round(1e3 * result.cpu_seconds, 2),
            "tokens_per_second": round(batch / result.seconds, 1),
            "spread": round(result.spread, 2),
        }
        for name, result in results.items()
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and writes; MISSED if time grows faster with the context than it should."""
    args = parser(__doc__).parse_args(arguments)
    rows, missed = [], False
    lines = [
        "| | dtype | rows | "
        + " | ".join(f"{c // 1024}k" for c in _CONTEXTS)
        + " | 64k / 4k | at most |",
        "|---|---|---|" + "---|" * (len(_CONTEXTS) + 2),
    ]
    print("\n".join(lines), flush=True)
    for preset, meaning in _PRESETS.items():
        for dtype, batch in (("float32", 1), ("float32", 8), ("bfloat16", 1)):
            found = measure(preset, dtype, batch)
            rows += found
            times = [row["milliseconds"] for row in found]
            ratio, goal = times[-1] / times[1], ""
            if batch == 1 and dtype == "float32":
                goal = f"{_GOALS[preset]:g}"
                missed |= ratio > _GOALS[preset]
            cells = " | ".join(f"{each:.1f}" for each in times)
            lines.append(f"| {meaning} | {dtype} | {batch} | {cells} | {ratio:.2f} | {goal} |")
            print(lines[-1], flush=True)
    title = "Milliseconds per step of the engine by context, medians; every row gets a token."
    if args.results is not None:
        command = own_command("decode", arguments)
        write_results(args.results, "decode", command, rows, [title, "", *lines])
    return MISSED if missed else 0


if __name__ == "__main__":
    run(main)
