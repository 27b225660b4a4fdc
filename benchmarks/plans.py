"""Runs `glm5 plan` for the published model on pods: whether it fits, how long that takes to say."""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.output import write_results

_PLANS = (
    ("glm-5", "--topology", "v6e:16x16", "--job", "decode"),
    ("glm-5.2", "--topology", "v5p:8x8x8", "--job", "prefill", "--context", "131072"),
    ("glm-5", "--topology", "v5p:8x8x16", "--job", "train"),
)
# The program, with its peak of memory on the last line of standard error.
_PROGRAM = (
    "import resource, sys; from glm5_jax.__main__ import main; status = main(); "
    "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr); sys.exit(status)"
)


def run(arguments: tuple[str, ...]) -> dict[str, Any]:
    """Runs one plan; returns what it printed, and what it took."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, "plan", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"glm5 plan {' '.join(arguments)}: {done.stderr}")
    return {
        "command": f"glm5 plan {' '.join(arguments)}",
        "output": done.stdout.rstrip(),
        "seconds": round(time.perf_counter() - began, 1),
        "peak_mib": round(int(done.stderr.split()[-1]) / 1024),
    }


def main(arguments: list[str] | None = None) -> int:
    """Plans and prints; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, help="folder to write plans.json and .md to")
    args = parser.parse_args(arguments)
    rows, lines = [], []
    for plan in _PLANS:
        rows.append(row := run(plan))
        lines += [f"`{row['command']}`", "", "```", row["output"], "```", ""]
        lines += [f"{row['seconds']:.0f} s and {row['peak_mib']:,} MiB of memory here.", ""]
        print("\n".join(lines[-8:]), flush=True)
    if args.results:
        write_results(args.results, "plans", "python -m benchmarks.plans", rows, lines, "libtpu")
    return 0


if __name__ == "__main__":
    sys.exit(main())
