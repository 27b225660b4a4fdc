"""Speed and memory of converting a checkpoint with GLM-5's structure, against `cp`.

The source has the names, layers and files of GLM-5, at a width that makes it a dozen gigabytes.
`cp` copies the same bytes before each conversion, whose source is not in the page cache either;
converted back, every tensor is compared. Needs four times the size on the disk.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import arguments
from benchmarks.output import own_command, write_results

SETTINGS = {
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "moe_intermediate_size": 1024,
    "n_routed_experts": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
SHARD_SIZE = "1GiB"
MEMORY = "1GiB"
_EVERY = 0.05  # seconds between looks at a process's memory
_GIB = 2**30


class Run(NamedTuple):
    """A process that has ended."""

    seconds: float
    cpu_seconds: float
    memory: list[tuple[float, float]]  # (seconds, resident bytes)

    @property
    def peak(self) -> float:
        """The largest resident size that was seen, in bytes."""
        return max((resident for _, resident in self.memory), default=0.0)


def run(command: list[str]) -> Run:
    """Runs a command and watches its memory."""
    before = os.times()
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    memory = []
    while process.poll() is None:
        for resident in _resident(process.pid):
            memory.append((time.perf_counter() - began, resident))
        time.sleep(_EVERY)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}")
    after = os.times()
    cpu = after.children_user + after.children_system
    return Run(seconds, cpu - before.children_user - before.children_system, memory)


def _resident(pid: int) -> Iterator[float]:
    """Resident bytes of a process; none once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        if line.startswith("VmRSS:"):
            yield float(line.split()[1]) * 1024


def forget(folder: Path) -> int:
    """Takes files out of the page cache; returns how many bytes they have."""
    subprocess.run(["sync", "-f", str(folder)], check=True)
    total = 0
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                total += os.fstat(file.fileno()).st_size
    return total


def convert(*arguments: str) -> Run:
    """Runs glm5-convert."""
    return run([sys.executable, "-m", "convert", *arguments])


def base(work: Path) -> float:
    """Resident bytes that a conversion of next to nothing takes: Python, JAX and the rest."""
    small = [f"--set={key}={value}" for key, value in {"num_hidden_layers": 4, **SETTINGS}.items()]
    small += ["--set=hidden_size=64", "--set=moe_intermediate_size=32", "--set=vocab_size=512"]
    convert("synthesize", str(work / "small"), *small)
    return convert("from-hf", str(work / "small"), str(work / "small-native")).peak


def measure(work: Path, repeats: int) -> list[dict[str, Any]]:
    """Each direction, and a copy of its source before each."""
    source, native, back = work / "source", work / "native", work / "back"
    settings = [f"--set={key}={value}" for key, value in SETTINGS.items()]
    convert("synthesize", str(source), "--shard-size", SHARD_SIZE, *settings)
    resident = base(work)
    rows = []
    for name, origin, made, options in (
        ("from-hf", source, native, []),
        ("to-hf", native, back, ["--shard-size", SHARD_SIZE]),
    ):
        copies, runs = [], []
        for _ in range(repeats):
            size = forget(origin)
            copies.append(run(["cp", "-r", str(origin), str(work / "copy")]))
            forget(work / "copy")
            shutil.rmtree(work / "copy")
            shutil.rmtree(made, ignore_errors=True)
            forget(origin)
            runs.append(convert(name, str(origin), str(made), "--memory", MEMORY, *options))
            forget(made)
        rows.append(_row(name, size, resident, copies, runs))
        print(json.dumps({key: value for key, value in rows[-1].items() if key != "memory"}))
    done = subprocess.run(
        [sys.executable, "-m", "convert", "diff", str(source), str(back)],
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout, done.stderr)
    rows[-1]["came back"] = done.stdout.splitlines()[-1]
    if done.returncode:
        raise SystemExit("what came back is not what was converted")
    return rows


def _row(
    name: str, size: int, resident: float, copies: list[Run], runs: list[Run]
) -> dict[str, Any]:
    seconds = statistics.median(each.seconds for each in runs)
    copied = statistics.median(each.seconds for each in copies)
    longest = max(runs, key=lambda each: each.peak)
    return {
        "direction": name,
        "gigabytes": size / 1e9,
        "seconds": seconds,
        "all_seconds": [each.seconds for each in runs],
        "cpu_seconds": statistics.median(each.cpu_seconds for each in runs),
        "cp_seconds": copied,
        "all_cp_seconds": [each.seconds for each in copies],
        "bytes_per_second": size / seconds,
        "speed_of_cp": copied / seconds,
        "peak_gib": longest.peak / _GIB,
        "base_gib": resident / _GIB,
        "memory": [(round(at, 2), int(resident)) for at, resident in longest.memory],
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Resident memory over time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4))
    for row in rows:
        at, resident = zip(*row["memory"], strict=True)
        axes.plot(at, [each / _GIB for each in resident], label=row["direction"])
    axes.axhline(rows[0]["base_gib"], color="gray", linestyle=":", label="of next to nothing")
    axes.axhline(rows[0]["base_gib"] + 2, color="gray", linestyle="--", label="and 2 GiB")
    axes.set(xlabel="seconds", ylabel="resident memory, GiB", ylim=(0, None))
    axes.set_title(f"Converting {rows[0]['gigabytes']:.1f} GB with --memory {MEMORY}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    """Measures, prints and writes."""
    command_line = arguments.parser(__doc__, default_repeats=3)
    command_line.add_argument("--work", type=Path, help="a folder on the disk to measure")
    args = command_line.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        rows = measure(Path(work), args.repeats)
    table = [
        "| direction | GB | seconds | GB/s | CPU-seconds | `cp`, seconds | of its speed "
        "| peak, GiB | of next to nothing |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        table.append(
            f"| {row['direction']} | {row['gigabytes']:.1f} | {row['seconds']:.1f} "
            f"| {row['bytes_per_second'] / 1e9:.2f} | {row['cpu_seconds']:.1f} "
            f"| {row['cp_seconds']:.1f} | {row['speed_of_cp']:.0%} "
            f"| {row['peak_gib']:.2f} | {row['base_gib']:.2f} |"
        )
    table += ["", f"Converted back and compared: {rows[-1]['came back']}."]
    print("\n".join(table))
    if args.results:
        command = own_command("convert")
        write_results(args.results, "convert", command, rows, table, "safetensors", "tensorstore")
        draw(rows, args.results / "convert.png")
    return 0


if __name__ == "__main__":
    arguments.run(main)
