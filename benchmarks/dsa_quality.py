"""Whether sparse attention, which follows on dense attention and a warm-up, is as good as dense.

`python -m benchmarks.dsa_quality --results benchmarks/results`. The sparse branch is the run of
`benchmarks.cpu_small`. The dense one leaves it at the end of the warm-up, which moves no weight
but the indexers', and reads the same rows with the same settings: what tokens attend to differs,
and that the norm by which gradients are clipped counts the indexers', too.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.arguments import run as run_main
from benchmarks.cpu_small import FILE
from benchmarks.runs import (
    Record,
    Run,
    Workplace,
    command_parser,
    new_figure,
    publish,
    table,
)
from glm5_jax.atomic import new_directory
from train.checkpoint import path_of
from train.claim import RUN_NAME
from train.metrics import METRICS_NAME
from train.run_file import make_settings, read_run_file
from train.stages import Stage, plan_stages

_DENSE = "dsa-dense"
_GOAL = 0.01  # by which the held-out loss may be higher than with dense attention


def continue_densely(place: Workplace, file: str, stages: Sequence[Stage], sparse: Run) -> Run:
    """The run again from the end of its warm-up on, attending to all tokens.

    Raises:
      SystemExit: what is in the folder left another run.
    """
    directory = place.folder / _DENSE
    if not directory.exists():
        end_of_warmup = path_of(sparse.directory, stages[-1].first)
        with new_directory(directory) as new:
            for name in (RUN_NAME, METRICS_NAME):
                shutil.copyfile(sparse.directory / name, new / name)
            shutil.copytree(end_of_warmup, new / end_of_warmup.name)
    settings = read_run_file(file)
    parts = [*settings.stages[:-1], settings.stages[-1] | {"stage": "dense"}]
    lines = [f"config = {json.dumps(settings.config)}"]
    for part in parts:
        lines += ["[[stages]]", *(f"{key} = {json.dumps(value)}" for key, value in part.items())]
    changed = place.folder / f"{_DENSE}.toml"
    changed.write_text("\n".join(lines) + "\n")
    dense, shared = (
        place.train(_DENSE, "--file", str(changed), "--accept-changes"),
        stages[-1].first,
    )
    if dense.records[:shared] != sparse.records[:shared]:
        sys.exit(
            f"{directory}: is of another run than {sparse.directory}; remove it to train it anew"
        )
    return dense


def learnt_tokens(record: Record, stages: Sequence[Stage]) -> int:
    """How many tokens the model, not its indexers, was trained on up to a step."""
    _, warmup, last = stages
    read_in_warmup = min(record["tokens"], last.first_token) - warmup.first_token
    return record["tokens"] - max(0, read_in_warmup)


def to_row(name: str, record: Record, stages: Sequence[Stage]) -> dict[str, Any]:
    """What is published of an evaluation."""
    return {
        "branch": name,
        "step": record["step"],
        "tokens": learnt_tokens(record, stages),
        "held_out_loss": record["held_out_loss"],
        "bits_per_byte": record["bits_per_byte"],
        "index_recall": record["index_recall"],
    }


def judge(sparse_loss: float, dense_loss: float) -> tuple[bool, str]:
    """Whether sparse attention is good enough, in words too."""
    higher = sparse_loss / dense_loss - 1
    measured = (
        f"The held-out loss with sparse attention is {higher:+.2%} from that with dense attention"
    )
    if higher > _GOAL:
        return False, f"FAILED: {measured}, expected at most {_GOAL:+.0%}."
    return True, f"{measured}; at most {_GOAL:+.0%} is asked for."


def layer_names(recalls: Sequence[float], num_mtp: int) -> list[str]:
    """Of the entries of `index_recall`."""
    layers = len(recalls) - num_mtp
    return [f"layer {number}" for number in range(1, layers + 1)] + ["MTP"] * num_mtp


def main(arguments: list[str] | None = None) -> int:
    """Trains, compares, prints and writes; fails if sparse attention is much worse."""
    parser = command_parser(__doc__)
    parser.add_argument("--file", default=FILE, help="run file of dense, warmup and sparse")
    args = parser.parse_args(arguments)
    stages = plan_stages(make_settings(read_run_file(args.file).stages, {}))
    place = Workplace(args.folder, args.max_bytes)
    sparse = place.train(FILE, "--file", args.file)
    dense = continue_densely(place, args.file, stages, sparse)
    at_end = {record["step"]: record for record in sparse.evaluations}
    before, after, last = (at_end[stage.end] for stage in stages)
    rows = [
        to_row("dense, to the first stage's end", before, stages),
        to_row("dense, after the indexers' warm-up", after, stages),
        to_row("dense to the end", dense.evaluations[-1], stages),
        to_row("sparse to the end", last, stages),
    ]
    holds, verdict = judge(last["held_out_loss"], dense.evaluations[-1]["held_out_loss"])
    names = layer_names(last["index_recall"], min(1, stages[-1].settings.mtp_depth))
    lines = [*_tables(rows, names), "", verdict]

    def draw(path: Path) -> None:
        _draw(sparse, dense, stages, names, path)

    publish(place, args.results, "dsa_quality", rows, lines, draw)
    return 0 if holds else 1


def _tables(rows: list[dict[str, Any]], names: list[str]) -> list[str]:
    losses = [
        [
            row["branch"],
            str(row["step"]),
            f"{row['tokens']:,}",
            f"{row['held_out_loss']:.4f}",
            f"{row['bits_per_byte']:.4f}",
        ]
        for row in rows
    ]
    head = ["attention", "step", "tokens learnt from", "held-out loss", "bits per byte"]
    moments = {"before the warm-up": rows[0], "after it": rows[1], "at the end": rows[3]}
    recalls = [
        [moment, *(f"{recall:.3f}" for recall in row["index_recall"])]
        for moment, row in moments.items()
    ]
    return [
        *table(head, losses),
        "",
        "Share of the attention that is paid to the tokens which the indexers select:",
        "",
        *table(["", *names], recalls),
    ]


def _draw(sparse: Run, dense: Run, stages: Sequence[Stage], names: list[str], path: Path) -> None:
    figure, (losses, recalls) = new_figure(2)
    for name, run, style in (("sparse", sparse, "o-"), ("dense", dense, "s--")):
        # In the warm-up the loss stays as it is.
        shown = [record for record in run.evaluations if record["stage"] != "warmup"]
        tokens = [learnt_tokens(record, stages) / 1e6 for record in shown]
        label = f"{name} in the last stage"
        losses.plot(tokens, [record["held_out_loss"] for record in shown], style, label=label)
    losses.axvline(stages[-2].first_token / 1e6, color="grey", linestyle=":")
    losses.set(xlabel="million tokens learnt from", title="held-out loss, nats per token")
    steps = [record["step"] for record in sparse.evaluations]
    for place, name in enumerate(names):
        values = [record["index_recall"][place] for record in sparse.evaluations]
        recalls.plot(steps, values, ".-", label=name)
    for stage in stages[1:]:
        recalls.axvline(stage.first, color="grey", linestyle=":")
    recalls.set(xlabel="step", ylim=(0, 1), title="recall of attention by the indexers")
    losses.legend()
    recalls.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run_main(main)
