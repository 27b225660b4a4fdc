"""How far float32 is from float64 in outputs of long prompts: transformers', and this project's.

Rounding swaps the last tokens selected, and the more of them the longer a prompt is. Programs that
agree but for rounding are about as far from the same numbers in float64. The scores of indexers are
of float32 there too, as transformers has them.
"""

from typing import Any

import numpy as np

from benchmarks import ours, peer
from benchmarks.agreement import gaps_by_position
from benchmarks.arguments import parser, run
from benchmarks.contest import output_of
from benchmarks.output import own_command, write_results
from benchmarks.peer import Setting
from benchmarks.workload import Work, checkpoint
from glm5_jax.commands.arguments import integer

_LENGTHS, _PROMPTS = (1024, 2048, 4096), 4
_WHICH = ("mean", "median", "largest")  # of the gaps of all positions
_HEAD = [
    "| tokens read | prompts | transformers: mean | median | largest "
    "| here: mean | median | largest |",
    "|" + "---|" * 8,
]


def measure(length: int, num_prompts: int) -> dict[str, Any]:
    """A row: the gaps of the last positions of all prompts."""
    pairs = [gaps_of(length, prompt) for prompt in range(num_prompts)]
    theirs, mine = (np.concatenate(gaps) for gaps in zip(*pairs, strict=True))
    return {
        "length": length,
        "prompts": num_prompts,
        "theirs": _described(theirs),
        "ours": _described(mine),
        "means_of_prompts": [[float(gaps.mean()) for gaps in pair] for pair in pairs],
    }


def gaps_of(length: int, prompt: int) -> tuple[np.ndarray, np.ndarray]:
    """Transformers' and ours, of equal scores the first selected by all three."""
    work = Work("prefill", "bench", "float32", 1, length, prompt)
    where = checkpoint(work.preset)

    exact = output_of(peer.make, where, work._replace(dtype="float64"), Setting(), True)
    theirs = output_of(peer.make, where, work, Setting(), True)
    mine = output_of(ours.make, where, work)
    return gaps_by_position(theirs, exact), gaps_by_position(mine, exact)


def _described(gaps: np.ndarray) -> dict[str, float]:
    found = (gaps.mean(), np.median(gaps), gaps.max())
    return {which: float(number) for which, number in zip(_WHICH, found, strict=True)}


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and writes."""
    command_line = parser(__doc__)
    command_line.add_argument(
        "--lengths", type=integer(1), nargs="+", default=_LENGTHS, help="of prompts, in tokens"
    )
    command_line.add_argument("--prompts", type=integer(1), default=_PROMPTS, help="of each length")
    args = command_line.parse_args(arguments)
    print("\n".join(_HEAD), flush=True)
    rows, table = [], list(_HEAD)
    for length in args.lengths:
        rows.append(measure(length, args.prompts))
        gaps = [rows[-1][who][which] for who in ("theirs", "ours") for which in _WHICH]
        table.append(
            f"| {length:,} | {args.prompts} | " + " | ".join(f"{gap:.1e}" for gap in gaps) + " |"
        )
        print(table[-1], flush=True)
    if args.results:
        command = own_command("rounding", arguments)
        write_results(args.results, "rounding", command, rows, table, "torch", "transformers")
    return 0


if __name__ == "__main__":
    run(main)
