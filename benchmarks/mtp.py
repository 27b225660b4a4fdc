"""What training the MTP layer on more tokens ahead gains when it drafts.

`python -m benchmarks.mtp --results benchmarks/results`. Attention is sparse from the first step
on, as it is when text is generated.
"""

from pathlib import Path
from typing import Any

from benchmarks.arguments import run
from benchmarks.drafts import code_prompts, make_engines, tokens_per_step
from benchmarks.runs import SETTINGS, Workplace, command_parser, new_figure, publish, table
from glm5_jax.commands.arguments import integer
from glm5_jax.inference.request import Sampling

_DEPTHS = (0, 1, 3)
_DRAFTS = (0, 1, 2, 3)
_PROMPTS = 16


def measure(place: Workplace, depth: int, steps: int) -> dict[str, Any]:
    """A model that learnt so many tokens ahead: its losses, and how far its drafts are right."""
    settings: dict[str, object] = {
        "steps": steps,
        "learning_rate": 3e-3,
        "final_learning_rate": 3e-4,
        "mtp_depth": depth,
    }
    run = place.train(f"mtp-{depth}", **SETTINGS | settings)
    engines = make_engines(run.checkpoint, _DRAFTS)
    gained = tokens_per_step(engines, code_prompts(place.data, _PROMPTS), Sampling())
    last = run.evaluations[-1]
    return {
        "mtp_depth": depth,
        "steps": steps,
        "held_out_loss": last["held_out_loss"],
        "bits_per_byte": last["bits_per_byte"],
        "mtp_acceptance": last["mtp_acceptance"],
        "tokens_per_step": {drafts: round(gained[drafts], 3) for drafts in _DRAFTS},
    }


def judge(rows: list[dict[str, Any]]) -> tuple[bool, str]:
    """Whether three drafts gain more the further ahead the layer learnt, in words too."""
    most = _DRAFTS[-1]
    gained = [row["tokens_per_step"][most] for row in rows]
    listed = ", ".join(
        f"{tokens:.2f} with {row['mtp_depth']}" for row, tokens in zip(rows, gained, strict=True)
    )
    measured = f"Tokens per step with {most} drafts, by tokens ahead that were learnt: {listed}"
    if not all(less < more for less, more in zip(gained, gained[1:], strict=False)):
        return False, f"FAILED: {measured}; expected to rise."
    return True, f"{measured}."


def main(arguments: list[str] | None = None) -> int:
    """Trains, generates, prints and writes; fails if learning further ahead gains nothing."""
    parser = command_parser(__doc__)
    parser.add_argument("--steps", type=integer(1), default=150, help="of training")
    args = parser.parse_args(arguments)
    place = Workplace(args.folder, args.max_bytes)
    rows = [measure(place, depth, args.steps) for depth in _DEPTHS]
    holds, verdict = judge(rows)
    head = ["tokens ahead learnt", *(f"{drafts} drafts" for drafts in _DRAFTS[1:])]
    head += ["drafts right in the evaluation, by depth", "held-out loss", "bits per byte"]
    cells = [
        [
            str(row["mtp_depth"]),
            *(f"{row['tokens_per_step'][drafts]:.2f}" for drafts in _DRAFTS[1:]),
            ", ".join(f"{share:.1%}" for share in row["mtp_acceptance"]) or "-",
            f"{row['held_out_loss']:.4f}",
            f"{row['bits_per_byte']:.4f}",
        ]
        for row in rows
    ]
    title = "Tokens per step of the main model, greedily, after prompts of held-out code."
    lines = [title, "", *table(head, cells), "", verdict]
    publish(place, args.results, "mtp", rows, lines, lambda path: _draw(rows, path))
    return 0 if holds else 1


def _draw(rows: list[dict[str, Any]], path: Path) -> None:
    figure, axes = new_figure(1)
    width = 0.8 / len(rows)
    for number, row in enumerate(rows):
        places = [drafts + (number - (len(rows) - 1) / 2) * width for drafts in _DRAFTS[1:]]
        heights = [row["tokens_per_step"][drafts] for drafts in _DRAFTS[1:]]
        axes.bar(places, heights, width, label=f"{row['mtp_depth']} tokens ahead learnt")
    axes.axhline(1, color="grey", linestyle=":")
    axes.set_xticks(_DRAFTS[1:])
    axes.set(xlabel="drafts", title="tokens per step of the main model")
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run(main)
