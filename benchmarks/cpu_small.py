"""Dense attention, the indexers' warm-up, then sparse attention, on two cores; twice the same.

`python -m benchmarks.cpu_small --results benchmarks/results`
"""

import filecmp
import shutil
from pathlib import Path

from benchmarks.arguments import run
from benchmarks.commands import run_command
from benchmarks.runs import Run, Workplace, command_parser, publish, table

FILE = "cpu-small"
# What a record says of the machine's speed rather than of what is learnt.
_SPEEDS = {"tokens_per_second", "tokens_per_second_per_device", "mfu"}
# Files that Orbax writes the time into.
_STAMPED = {"_CHECKPOINT_METADATA", "commit_success.txt"}


def differences(first: Run, second: Run) -> list[str]:
    """The steps whose numbers, and the files of the last checkpoints, that are not the same."""
    numbers = [
        [{name: value for name, value in record.items() if name not in _SPEEDS} for record in run]
        for run in (first.records, second.records)
    ]
    found = []
    if len(numbers[0]) != len(numbers[1]):
        found.append(f"{len(numbers[0])} and {len(numbers[1])} steps")
    found += [
        f"the numbers of step {one['step']}"
        for one, other in zip(*numbers, strict=False)
        if one != other
    ]
    files = [_files(run.checkpoint) for run in (first, second)]
    for name in sorted(files[0] | files[1]):
        is_in_both = name in files[0] & files[1]
        one, other = first.checkpoint / name, second.checkpoint / name
        if not is_in_both or not filecmp.cmp(one, other, shallow=False):
            found.append(str(name))
    return found


def _files(directory: Path) -> set[Path]:
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {path.relative_to(directory) for path in paths if path.name not in _STAMPED}


def main(arguments: list[str] | None = None) -> int:
    """Trains, compares, prints and writes; fails if the second run is another than the first."""
    parser = command_parser(__doc__)
    parser.add_argument("--file", default=FILE, help="run file")
    parser.add_argument("--once", action="store_true", help="leave out the second run")
    args = parser.parse_args(arguments)
    place = Workplace(args.folder, args.max_bytes)
    names = [FILE] if args.once else [FILE, f"{FILE}-again"]
    runs = [place.train(name, "--file", args.file) for name in names]
    found = differences(*runs) if len(runs) > 1 else []
    rows = [
        {
            "run": name,
            "steps": run.records[-1]["step"],
            "tokens": run.records[-1]["tokens"],
            "held_out_loss": run.evaluations[-1]["held_out_loss"],
            "bits_per_byte": run.evaluations[-1]["bits_per_byte"],
            "minutes": round(run.made["seconds"] / 60, 1),
        }
        for name, run in zip(names, runs, strict=True)
    ]
    head = ["run", "steps", "tokens", "held-out loss", "bits per byte", "minutes"]
    cells = [
        [name, str(steps), f"{tokens:,}", f"{loss:.4f}", f"{bits:.4f}", str(minutes)]
        for name, steps, tokens, loss, bits, minutes in (row.values() for row in rows)
    ]
    lines = [f"The run file {args.file}, from random weights.", "", *table(head, cells)]
    if len(runs) > 1:
        same = "Both runs have the same numbers at every step and the same last checkpoint."
        others = f"FAILED: {len(found)} differ between the runs: {', '.join(found[:10])}"
        lines += ["", others if found else same]
    run_command("train", "report", runs[0].directory)
    picture = runs[0].directory / "report" / "losses.png"

    def draw(path: Path) -> None:
        shutil.copyfile(picture, path)

    publish(place, args.results, "cpu_small", rows, lines, draw)
    return 1 if found else 0


if __name__ == "__main__":
    run(main)
