"""Plans of the published model on pods, and of the run files that are for accelerators.

Whether they fit, and what saying so takes here.
"""

import json
import subprocess
import sys
import time
from typing import Any

from benchmarks.arguments import parser, run
from benchmarks.commands import NAMES
from benchmarks.output import RESULTS, commit, write_results
from glm5_jax.errors import InputError

_PLANS: tuple[tuple[str, ...], ...] = (
    ("glm5_jax", "glm-5", "--topology", "v6e:16x16", "--job", "decode"),
    ("glm5_jax", "glm-5.2", "--topology", "v5p:8x8x8", "--job", "prefill", "--context", "131072"),
    ("glm5_jax", "glm-5", "--topology", "v5p:8x8x16", "--job", "train"),
    ("train", "single-h200", "--topology", "h200:1"),
    ("train", "v5p-64", "--topology", "v5p:4x4x2"),
)
_FEW_BITS: tuple[tuple[str, ...], ...] = (
    ("glm5_jax", "glm-5", "--topology", "v6e:4x8", "--batch", "32", "--weights", "float8"),
    ("glm5_jax", "glm-5", "--topology", "v6e:4x8", "--batch", "32", "--weights", "int8"),
    ("glm5_jax", "glm-5", "--topology", "v5p:2x2x2", "--batch", "32", "--weights", "int4"),
)
# The program, with its peak of memory on the last line of standard error.
_PROGRAM = (
    "import resource, sys; from {module}.__main__ import main; status = main(); "
    "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr); sys.exit(status)"
)


def command_of(module: str, *arguments: str) -> str:
    """What a user types for a plan."""
    return f"{NAMES[module]} plan {' '.join(arguments)}"


def run_plan(module: str, *arguments: str) -> dict[str, Any]:
    """Runs one plan; returns what it printed, and what it took."""
    command, began = command_of(module, *arguments), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(module=module), "plan", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{command}: {done.stderr}")
    return {
        "command": command,
        "commit": commit(),
        "output": done.stdout.rstrip(),
        "seconds": round(time.perf_counter() - began, 1),
        "peak_mib": round(int(done.stderr.split()[-1]) / 1024),
    }


def main(arguments: list[str] | None = None) -> int:
    """Plans and prints; returns the exit status."""
    command_line = parser(__doc__)
    command_line.add_argument("--few-bits", action="store_true", help="of weights in few bits")
    command_line.add_argument(
        "--only",
        default="",
        help="plans that have this in their command; others only if never made",
    )
    args = command_line.parse_args(arguments)
    name, command, plans = "plans", "python -m benchmarks.plans", _PLANS
    if args.few_bits:
        name, command, plans = "plans_few_bits", f"{command} --few-bits", _FEW_BITS
    report = json.loads((RESULTS / f"{name}.json").read_text())
    before = {row["command"]: row for row in report["rows"]}
    commands = [command_of(*plan) for plan in plans]
    if not any(args.only in command for command in commands):
        raise InputError(
            f"--only {args.only!r:.80}: in no plan's command, expected part of one of "
            + ", ".join(commands)
        )
    rows, lines = [], []
    for plan, planned in zip(plans, commands, strict=True):
        known = planned in before and args.only not in planned
        rows.append(row := before[planned] if known else run_plan(*plan))
        lines += [f"`{row['command']}`", "", "```", row["output"], "```", ""]
        lines += [f"{row['seconds']:.0f} s and {row['peak_mib']:,} MiB of memory here.", ""]
        print("\n".join(lines[-8:]), flush=True)
    if args.results:
        write_results(args.results, name, command, rows, lines, "libtpu")
    return 0


if __name__ == "__main__":
    run(main)
