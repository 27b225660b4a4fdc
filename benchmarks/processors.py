"""The rows of `speed` on all processors that they were measured on, side by side.

Reads the results of each, in benchmarks/results and its folders, and measures nothing.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.arguments import run
from benchmarks.output import RESULTS
from benchmarks.speed import ROWS
from benchmarks.workload import Work
from glm5_jax.console import Parser


class Processor(NamedTuple):
    """What was measured on one."""

    name: str
    rows: dict[Work, dict[str, Any]]
    gigaflops: float  # of a large product in float32
    gigabytes: float  # read in a second


def read_processor(folder: Path) -> Processor:
    """What the results in a folder say."""
    speed = json.loads((folder / "speed.json").read_text())
    primitives = json.loads((folder / "roofline_machine.json").read_text())["rows"]
    tops = {(row["name"], row["dtype"]): row for row in primitives if row["kind"] == "ceiling"}
    product, reading = tops["large product", "float32"], tops["reading", "float32"]
    return Processor(
        speed["machine"]["processor"],
        {Work.of(row): row for row in speed["rows"]},
        product["flops"] / product["seconds"] / 1e9,
        reading["bytes"] / reading["seconds"] / 1e9,
    )


def lines(processors: list[Processor]) -> Iterator[str]:
    """How many times transformers' tokens per second each has, in Markdown."""
    names = [
        f"{each.name} ({each.gigaflops:.0f} GFLOP/s, {each.gigabytes:.0f} GB/s)"
        for each in processors
    ]
    yield f"| work | dtype | rows | tokens | goal | {' | '.join(names)} |"
    yield "|" + "---|" * (5 + len(names))
    for work, goal, _ in ROWS:
        found = [each.rows.get(work) for each in processors]
        times = ["" if row is None else _shown(row) for row in found]
        size = (work.kind, work.dtype, str(work.batch), f"{work.length:,}", f"{goal:g}")
        yield f"| {' | '.join([*size, *times])} |"
    yield ""
    yield "Times transformers' tokens per second; in brackets products in float32, and reading."
    yield ""
    for each in processors:
        commits = sorted({row["commit"] for row in each.rows.values()})
        yield f"- {each.name}: at {', '.join(commits)}"


def _shown(row: dict[str, Any]) -> str:
    return f"{row['times']:.3g}{'' if row['agrees'] else ' (wrong)'}"


def table() -> str:
    """The file that `main` writes."""
    folders = [RESULTS, *sorted(path.parent for path in RESULTS.glob("*/speed.json"))]
    return "\n".join(lines([read_processor(folder) for folder in folders])) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Writes the table beside the results."""
    Parser(description=__doc__).parse_args(arguments)
    (RESULTS / "processors.md").write_text(table())
    return 0


if __name__ == "__main__":
    run(main)
