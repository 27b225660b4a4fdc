"""The model that comes along, `glm5 generate --model tiny`: published from a run, with a card.

`python -m benchmarks.ship --folder build/training`, after `benchmarks.cpu_small` there.
"""

import json
import shutil
from pathlib import Path

from benchmarks.arguments import run
from benchmarks.commands import run_command
from benchmarks.runs import Run
from glm5_jax.console import Parser
from train.claim import RUN_NAME
from train.metrics import METRICS_NAME, read_metrics

_CARD = """# {name}

A GLM-5 of {parameters:,} parameters that completes Python, to try things out and for tests: dense
and MoE layers, a sparse-attention indexer and layers that share its selection, a multi-token
prediction layer, all trained. It has read {tokens:,} tokens of the source of Python {python}'s
standard library, whose licence is the Python Software Foundation's, and knows nothing else.

Made by `glm5-train prepare DATA --vocab-size 2048`, `glm5-train run DATA RUN --file cpu-small`
({stages}) and `glm5-convert to-hf RUN/step-N DIR --dtype bfloat16`, at commit {commit}.

| on files held out | |
|---|---|
| loss | {loss:.4f} nats per token |
| bits per byte | {bits:.4f} |
| drafts accepted, by depth | {accepted} |
| attention that the selected tokens get, by layer | {recall} |

![Losses](losses.png)
"""


def card(run: Run, name: str) -> str:
    """What the model is and how well it does."""
    last = run.evaluations[-1]
    stages = json.loads((run.directory / RUN_NAME).read_text())["stages"]
    return _CARD.format(
        name=name,
        parameters=_num_parameters(run.checkpoint),
        tokens=last["tokens"],
        python=run.made["python"],
        stages=", ".join(f"{stage['stage']} {stage['steps']} steps" for stage in stages),
        commit=", ".join(run.made["commits"]),
        loss=last["held_out_loss"],
        bits=last["bits_per_byte"],
        accepted=", ".join(f"{share:.2f}" for share in last["mtp_acceptance"]),
        recall=", ".join(f"{share:.2f}" for share in last["index_recall"]),
    )


def _num_parameters(checkpoint: Path) -> int:
    info = run_command("glm5_jax", "info", "--json", checkpoint)
    return int(json.loads(info)["parameters"]["total"])


def main(arguments: list[str] | None = None) -> int:
    """Publishes the last checkpoint of the run under a new folder."""
    parser = Parser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/training"))
    parser.add_argument("--run", default="cpu-small", help="its name in the folder")
    parser.add_argument("--to", type=Path, default=Path("glm5_jax/models/tiny"))
    args = parser.parse_args(arguments)
    directory = args.folder / args.run
    run = Run(directory, read_metrics(directory / METRICS_NAME))
    run_command("train", "report", directory)
    run_command("convert", "to-hf", run.checkpoint, args.to, "--dtype", "bfloat16")
    shutil.copyfile(directory / "report" / "losses.png", args.to / "losses.png")
    (args.to / "README.md").write_text(card(run, args.to.name))
    return 0


if __name__ == "__main__":
    run(main)
