"""Training runs that benchmarks compare: made once, and read again from their folder."""

import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.arguments import parser
from benchmarks.commands import run_command
from benchmarks.output import commit, own_command, write_results
from glm5_jax.commands.arguments import integer
from glm5_jax.console import Parser
from train.checkpoint import path_of
from train.metrics import METRICS_NAME, read_metrics

Record = dict[str, Any]

VOCAB_SIZE = 2048
# Of runs whose learning rate falls to a tenth of its highest.
SETTINGS: dict[str, object] = {
    "config": "demo",
    "batch_size": 4,
    "length": 512,
    "warmup_steps": 30,
    "balance_rate": 0.01,
    "eval_rows": 128,
    "keep": 1,
}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that has come to its end."""

    directory: Path
    records: list[Record]

    @property
    def evaluations(self) -> list[Record]:
        """The records of steps after which held-out text was scored."""
        return [record for record in self.records if "held_out_loss" in record]

    @property
    def checkpoint(self) -> Path:
        """The last one."""
        return path_of(self.directory, self.records[-1]["step"])

    @property
    def made(self) -> dict[str, Any]:
        """How: seconds of all commands that took its steps, commits they ran at, Python's version.

        A command that was killed with the benchmark itself is not among them.
        """
        path = _made_path(self.directory)
        if not path.exists():
            return {"seconds": 0.0, "commits": [], "python": platform.python_version()}
        made: dict[str, Any] = json.loads(path.read_text())
        return made

    @property
    def seconds_per_step(self) -> float:
        """The median, of steps that all read as many tokens."""
        tokens = self.records[0]["tokens"]
        return tokens / statistics.median(record["tokens_per_second"] for record in self.records)


class Workplace:
    """A folder of data and runs; what is finished there is not done again."""

    def __init__(self, folder: Path, max_bytes: int | None):
        """Tokenizes the Python standard library, if that is not done.

        Args:
          max_bytes: of it to use at most.
        """
        self.folder, self.data = folder, folder / "data"
        self.runs: dict[str, dict[str, Any]] = {}  # that were asked for, and how they were made
        if not self.data.exists():
            limit = () if max_bytes is None else ("--max-bytes", max_bytes)
            run_command("train", "prepare", self.data, "--vocab-size", VOCAB_SIZE, *limit)

    def train(self, name: str, *options: str, **settings: object) -> Run:
        """Trains the run of a name with options and settings, or goes on training it."""
        directory = self.folder / name
        begun, before = time.perf_counter(), _steps(directory)
        if not before:  # and what was there was removed, to be trained anew
            _made_path(directory).unlink(missing_ok=True)
        made = Run(directory, []).made
        words = [word for key, value in settings.items() for word in (_option(key), value)]
        at = commit()
        try:
            run_command("train", "run", self.data, directory, *options, *words)
        finally:
            if _steps(directory) != before:
                made["seconds"] += round(time.perf_counter() - begun, 1)
                made["commits"] = list(dict.fromkeys([*made["commits"], at]))
                _made_path(directory).write_text(json.dumps(made) + "\n")
        run = Run(directory, read_metrics(directory / METRICS_NAME))
        self.runs[name] = run.made
        return run


def _made_path(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.json")


def _option(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _steps(directory: Path) -> int:
    metrics = directory / METRICS_NAME
    return len(read_metrics(metrics)) if metrics.exists() else 0


def command_parser(meaning: str | None) -> Parser:
    """The options that all these benchmarks have."""
    made = parser(meaning)
    made.add_argument(
        "--folder", type=Path, default=Path("build/training"), help="of runs, kept between calls"
    )
    made.add_argument("--max-bytes", type=integer(1), help="of text")
    return made


def publish(
    place: Workplace,
    results: Path | None,
    name: str,
    rows: list[dict[str, Any]],
    lines: list[str],
    draw: Callable[[Path], None],
) -> None:
    """Prints the lines, and writes them, the rows and a picture to the folder if there is one."""
    print("\n".join(["", *lines]), flush=True)
    if results is not None:
        command = own_command(name)
        write_results(results, name, command, rows, lines, runs=place.runs)
        draw(results / f"{name}.png")


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of Markdown."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def new_figure(panels: int) -> tuple[Any, Any]:
    """A picture without a window, and its axes side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, panels, figsize=(5.5 * panels, 4), layout="constrained")
