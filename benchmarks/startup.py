"""How long it takes until something happens: imports, --help, and a first answer.

A command's first answer is measured with no compiled program kept, and with those of the run
before it.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.arguments import MISSED, parser, run
from benchmarks.output import own_command, write_results

_GENERATE = ["glm5_jax", "generate", "--model", "tiny", "--prompt", "def ", "--max-new-tokens", "8"]
# What is run, and the seconds that it may take.
PROGRAMS: dict[str, tuple[list[str], float | None]] = {
    "import glm5_jax": (["-c", "import glm5_jax"], 1.5),
    "import glm5_jax; glm5_jax.forward": (["-c", "import glm5_jax; glm5_jax.forward"], 1.5),
    "glm5 --help": (["-m", "glm5_jax", "--help"], 0.5),
    "glm5-train --help": (["-m", "train", "--help"], 0.5),
    "glm5-convert --help": (["-m", "convert", "--help"], 0.5),
}
_FIRST, _AGAIN = "glm5 generate --model tiny, first", "glm5 generate --model tiny, again"


def seconds(arguments: list[str], cache: str = "") -> float:
    """How long Python takes to run something."""
    environment = os.environ | {"XDG_CACHE_HOME": cache}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments], env=environment, check=True, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - began


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints; MISSED if something takes longer than it may."""
    args = parser(__doc__, default_repeats=5).parse_args(arguments)
    times: dict[str, list[float]] = {name: [] for name in (*PROGRAMS, _FIRST, _AGAIN)}
    for _ in range(args.repeats):
        for name, (program, _) in PROGRAMS.items():
            times[name].append(seconds(program))
        with tempfile.TemporaryDirectory() as cache:
            for name in (_FIRST, _AGAIN):
                times[name].append(seconds(["-m", *_GENERATE], cache))
    goals = {name: goal for name, (_, goal) in PROGRAMS.items()}
    rows: list[dict[str, Any]] = [
        {"what": name, "seconds": each, "goal": goals.get(name)} for name, each in times.items()
    ]
    table = ["| what | seconds, median | may take |", "|---|---|---|"]
    for row in rows:
        goal = "" if row["goal"] is None else f"{row['goal']:g}"
        table.append(f"| `{row['what']}` | {statistics.median(row['seconds']):.2f} | {goal} |")
    print("\n".join(table))
    if args.results:
        command = own_command("startup", arguments)
        write_results(args.results, "startup", command, rows, table)
    missed = [
        row for row in rows if row["goal"] and statistics.median(row["seconds"]) > row["goal"]
    ]
    return MISSED if missed else 0


if __name__ == "__main__":
    run(main)
