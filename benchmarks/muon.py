"""AdamW, Muon and Muon Split, after as many steps, each at its better learning rate.

`python -m benchmarks.muon --results benchmarks/results`
"""

import statistics
from pathlib import Path
from typing import Any

from benchmarks.arguments import run
from benchmarks.runs import (
    SETTINGS,
    Run,
    Workplace,
    command_parser,
    new_figure,
    publish,
    table,
)
from glm5_jax.commands.arguments import integer

_NAMES = {"adamw": "AdamW", "muon": "Muon", "muon_split": "Muon Split"}
_SPLIT = "muon_split"
_EQUAL = 0.01  # nats per token by which losses differ that are called equal


def train(place: Workplace, optimizer: str, rate: float, seed: int, steps: int) -> Run:
    """A run without sparse attention; six evaluations."""
    settings: dict[str, object] = {
        "stage": "dense",
        "steps": steps,
        "optimizer": optimizer,
        "learning_rate": rate,
        "final_learning_rate": rate / 10,
        "seed": seed,
        "eval_every": max(1, steps // 6),
    }
    return place.train(f"muon-{optimizer}-{rate:g}-{seed}", **SETTINGS | settings)


def to_row(optimizer: str, rate: float, runs: list[Run]) -> dict[str, Any]:
    """What is published of an optimizer at a rate: of every seed, and the means."""
    lasts = [run.evaluations[-1] for run in runs]
    return {
        "optimizer": optimizer,
        "learning_rate": rate,
        "steps": runs[0].records[-1]["step"],
        "held_out_losses": [last["held_out_loss"] for last in lasts],
        "held_out_loss": statistics.mean(last["held_out_loss"] for last in lasts),
        "bits_per_byte": statistics.mean(last["bits_per_byte"] for last in lasts),
        "seconds_per_step": round(statistics.median(run.seconds_per_step for run in runs), 3),
    }


def pick_best(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By optimizer, the row with the lowest loss."""
    best: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["held_out_loss"]):
        best.setdefault(row["optimizer"], row)
    return best


def compare(best: dict[str, dict[str, Any]]) -> str:
    """What Muon Split is to each of the others."""
    own, parts = best[_SPLIT]["held_out_loss"], []
    for optimizer, row in best.items():
        if optimizer == _SPLIT:
            continue
        higher = own - row["held_out_loss"]
        verb = "equals" if abs(higher) <= _EQUAL else "beats" if higher < 0 else "is worse than"
        parts.append(f"{verb} {_NAMES[optimizer]} ({higher:+.4f} nats per token)")
    return f"Muon Split {' and '.join(parts)}; up to {_EQUAL} either way is called equal."


def main(arguments: list[str] | None = None) -> int:
    """Trains, prints and writes."""
    parser = command_parser(__doc__)
    parser.add_argument("--steps", type=integer(1), default=200, help="of training")
    parser.add_argument("--seeds", type=integer(0), nargs="+", default=[0])
    parser.add_argument("--adamw-rates", type=float, nargs="+", default=[3e-3, 6e-3])
    parser.add_argument("--muon-rates", type=float, nargs="+", default=[3e-3, 1e-2])
    args = parser.parse_args(arguments)
    place = Workplace(args.folder, args.max_bytes)
    runs = {
        (optimizer, rate): [train(place, optimizer, rate, seed, args.steps) for seed in args.seeds]
        for optimizer in _NAMES
        for rate in (args.adamw_rates if optimizer == "adamw" else args.muon_rates)
    }
    rows = [to_row(optimizer, rate, own) for (optimizer, rate), own in runs.items()]
    best = pick_best(rows)
    cells = [_cells(row, is_best=row is best[row["optimizer"]]) for row in rows]
    head = ["optimizer", "learning rate", *(f"loss, seed {seed}" for seed in args.seeds)]
    head += ["mean loss", "bits per byte", "seconds per step"]
    title = f"Held-out loss after {args.steps} steps; in bold, each optimizer's best rate."
    lines = [title, "", *table(head, cells), "", compare(best)]
    shown = {
        f"{_NAMES[optimizer]}, {row['learning_rate']:g}": runs[optimizer, row["learning_rate"]]
        for optimizer, row in best.items()
    }
    publish(place, args.results, "muon", rows, lines, lambda path: _draw(shown, path))
    return 0


def _cells(row: dict[str, Any], *, is_best: bool) -> list[str]:
    mean = f"{row['held_out_loss']:.4f}"
    return [
        _NAMES[row["optimizer"]],
        f"{row['learning_rate']:g}",
        *(f"{loss:.4f}" for loss in row["held_out_losses"]),
        f"**{mean}**" if is_best else mean,
        f"{row['bits_per_byte']:.4f}",
        f"{row['seconds_per_step']:.2f}",
    ]


def _draw(shown: dict[str, list[Run]], path: Path) -> None:
    figure, axes = new_figure(1)
    for label, runs in shown.items():
        steps = [record["step"] for record in runs[0].evaluations]
        by_seed = [[record["held_out_loss"] for record in run.evaluations] for run in runs]
        axes.plot(steps, list(map(statistics.mean, zip(*by_seed, strict=True))), "o-", label=label)
    axes.set(xlabel="step", title="held-out loss, nats per token, the mean over seeds")
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run(main)
