"""What benchmarks write: their results, and what these were measured on."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"  # those that are committed
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def describe_machine(*more: str) -> dict[str, Any]:
    """Processor, memory, commit, and versions of Python and packages, of some more than usual."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "python": platform.python_version(),
        **{package: version(package) for package in (*PACKAGES, *more)},
        "commit": commit(),
    }


def own_command(module: str, arguments: Sequence[str] | None = None) -> str:
    """The command that a benchmark was called with, but for where to write results.

    Args:
      arguments: those of the process unless given.
    """
    given = [str(each) for each in (sys.argv[1:] if arguments is None else arguments)]
    if "--results" in given:
        place = given.index("--results")
        del given[place : place + 2]
    given = [each for each in given if not each.startswith("--results=")]
    return shlex.join(["python", "-m", f"benchmarks.{module}", *given])


def measured_on(command: str, machine: dict[str, Any]) -> str:
    """What stands below a table: how its numbers were made."""
    return (
        f"`{command}` at {machine['commit']}, on {machine['cores']} cores ({machine['processor']}, "
        f"{machine['memory_gib']} GiB), Python {machine['python']}, jax {machine['jax']}."
    )


def write_results(
    folder: Path,
    name: str,
    command: str,
    rows: list[dict[str, Any]],
    table: list[str],
    *more: str,
    runs: dict[str, dict[str, Any]] | None = None,
) -> None:
    """Writes `name.json`, and a table for readers as `name.md`, which says how it was measured.

    Args:
      command: as `own_command` has it.
      more: packages beside the usual whose versions matter.
      runs: what the numbers are of, if it was made earlier: by name, how.
    """
    machine = describe_machine(*more)
    report = {"command": command, "machine": machine, "rows": rows}
    if runs is not None:
        report["runs"] = runs
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    lines = [*table, "", measured_on(command, machine)]
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n")


def _processor() -> str:
    """Its name; of x86, family and model too, as clouds name theirs alike for generations."""
    told: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        told.setdefault(name.strip(), value.strip())
    name = told.get("model name", platform.machine())
    if "cpu family" not in told:
        return name
    return f"{name}, family {told['cpu family']}, model {told['model']}"


def commit() -> str:
    """The one that is checked out, and whether files differ from it, results left out."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)

    name = git("describe", "--always").stdout.strip()
    changed = git("diff-index", "--quiet", "HEAD", "--", ":(exclude)benchmarks/results").returncode
    return (name + "-dirty" * bool(changed)) if name else "unknown"
