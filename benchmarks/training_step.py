"""A full training step: what its parts cost, what recomputing does, and MaxText's beside it.

MaxText is measured too where `--maxtext` asks for it; `benchmarks/maxtext_step.py` says how to
install it.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import maxtext_step
from benchmarks.arguments import MISSED, parser, run
from benchmarks.contest import Program, Result, take_turns
from benchmarks.output import own_command, write_results
from glm5_jax.config import Config, IndexerConfig
from glm5_jax.errors import InputError
from glm5_jax.presets import load_preset
from glm5_jax.strict_json import read_json

_LENGTH = 2048
_GOAL = 4.0  # times MaxText's tokens per second of a core
_PEER = "MaxText"  # the contest with it
_NEXT, _INDEXERS, _MTP = "next token", "next token, indexers", "next token, MTP"
_ALL = "next token, indexers, MTP"
_LEARNS: dict[str, dict[str, Any]] = {
    _NEXT: {"index_weight": 0.0, "mtp_depth": 0},
    _INDEXERS: {"mtp_depth": 0},
    _MTP: {"index_weight": 0.0},
    _ALL: {},
}
# Programs that take turns: by title, what is learnt and what is recomputed.
_ROUNDS_OF: dict[str, list[tuple[str, str]]] = {
    "parts": [(learns, "none") for learns in _LEARNS],
    "recomputing": [(_ALL, remat) for remat in ("none", "products", "layers")],
}
_HEAD = [
    "| program | learns | recomputes | s | tokens/s | CPU s | tokens per CPU s "
    "| slowest over fastest | most memory, GB |",
    "|" + "---|" * 9,
]


def config() -> Config:
    """The bench preset with the vocabulary, experts and indexers MaxText was first measured with.

    Few index heads leave many tokens with equal scores, which matters to what is selected, not to
    how long it takes.
    """
    bench = load_preset("bench").config
    return dataclasses.replace(
        bench,
        vocab_size=32768,
        moe=dataclasses.replace(bench.moe, num_experts=16),
        indexer=IndexerConfig(num_heads=4, head_dim=64, topk=512),
    )


def make(config: Config, length: int, learns: str, remat: str) -> Program:
    """A `contest.Maker`: one step that learns a row of random tokens; the output is their loss."""
    import jax

    from glm5_jax.mesh import single_device
    from glm5_jax.sharding import TRAIN, Partition
    from train.optimizer import make_recipe
    from train.settings import Settings
    from train.state import start
    from train.step import make_step

    settings = Settings(batch_size=1, length=length, remat=remat, **_LEARNS[learns])
    partition = Partition(single_device(), TRAIN)
    recipe = make_recipe(config, settings)
    states = [start(config, recipe, partition, settings.seed)]
    step = make_step(config, recipe, partition, remat=remat)
    tokens_BT = np.random.default_rng(0).integers(1, config.vocab_size, (1, length), np.int32)

    def run() -> np.ndarray:
        with jax.set_mesh(partition.mesh):
            state, metrics = step(states.pop(), tokens_BT, np.ones_like(tokens_BT))
            states.append(jax.block_until_ready(state))
        return np.array([metrics.losses.next_token])

    return Program(run, run)


def measure(
    config: Config, length: int, makers: dict[tuple[str, str, str], tuple[Any, ...]], rounds: int
) -> list[dict[str, Any]]:
    """A row for each of the programs that take turns, by name, what it learns and recomputes.

    Raises:
      InputError: the first loss of one is not that of guessing, so that it does something else.
    """
    results = take_turns(
        {" / ".join(key): maker for key, maker in makers.items()},
        rounds,
        0.0,
        with_peaks=True,
        huge_pages=True,
    )
    rows = []
    for (program, learns, remat), result in zip(makers, results.values(), strict=True):
        if not abs(result.output[0] - math.log(config.vocab_size)) < 1:  # nor is NaN
            raise InputError(f"{program}: a loss of {result.output[0]:.3f} is not that of guessing")
        rows.append({"program": program, "learns": learns, "remat": remat, **_of(result, length)})
    return rows


def _of(result: Result, length: int) -> dict[str, float]:
    return {
        "seconds": result.seconds,
        "cpu_seconds": result.cpu_seconds,
        "spread": result.spread,
        "tokens_per_second": length / result.seconds,
        "tokens_per_cpu_second": length / result.cpu_seconds,
        "peak_bytes": result.peak,
        "loss": float(result.output[0]),
    }


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    return (
        f"| {row['program']} | {row['learns']} | {row['remat']} | {row['seconds']:.2f} "
        f"| {row['tokens_per_second']:.0f} | {row['cpu_seconds']:.2f} "
        f"| {row['tokens_per_cpu_second']:.0f} | {row['spread']:.2f} "
        f"| {row['peak_bytes'] / 1e9:.2f} |"
    )


def verdicts(rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    """What the rows of each contest say, in words."""
    by_learns = {row["learns"]: row["cpu_seconds"] for row in rows["parts"]}
    said = [
        f"CPU time that a part adds: MTP {by_learns[_MTP] / by_learns[_NEXT] - 1:.0%}, "
        f"the indexers' loss {by_learns[_INDEXERS] / by_learns[_NEXT] - 1:.0%}, "
        f"both {by_learns[_ALL] / by_learns[_NEXT] - 1:.0%}."
    ]
    if _PEER in rows:
        said.append(
            f"Tokens per CPU second, here over MaxText's fastest: {_times(rows[_PEER]):.1f} "
            f"(goal {_GOAL:g})."
        )
    return said


def _times(rows: list[dict[str, Any]]) -> float:
    own, *others = (row["tokens_per_cpu_second"] for row in rows)
    return float(own / max(others))


def _has_maxtext(path: Path) -> bool:
    return path.exists() and any(row["contest"] == _PEER for row in read_json(path)["rows"])


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and writes; MISSED if MaxText was measured and is too near."""
    command_line = parser(__doc__, default_repeats=3)
    command_line.add_argument("--maxtext", action="store_true", help="MaxText too")
    args = command_line.parse_args(arguments)
    if args.maxtext and not maxtext_step.is_installed():
        raise InputError(
            "--maxtext: it is not installed here; benchmarks/maxtext_step.py says how it is"
        )
    if args.results and not args.maxtext and _has_maxtext(args.results / "training_step.json"):
        raise InputError(
            f"--results {args.results}: MaxText's rows there would be lost, expected --maxtext or "
            "another folder"
        )
    own = config()
    contests: dict[str, dict[tuple[str, str, str], tuple[Any, ...]]] = {
        title: {("here", *each): (make, own, _LENGTH, *each) for each in programs}
        for title, programs in _ROUNDS_OF.items()
    }
    if args.maxtext:
        contests[_PEER] = {("here", _INDEXERS, "none"): (make, own, _LENGTH, _INDEXERS, "none")}
        contests[_PEER] |= {
            (name, _INDEXERS, remat): (maxtext_step.make, own, _LENGTH, setting)
            for (name, remat), setting in maxtext_step.SETTINGS.items()
        }
    rows: dict[str, list[dict[str, Any]]] = {}
    table = list(_HEAD)
    print("\n".join(table), flush=True)
    for title, makers in contests.items():
        rows[title] = measure(own, _LENGTH, makers, args.repeats)
        lines = [line(row) for row in rows[title]]
        print("\n".join(lines), flush=True)
        table += lines
    said = ["", *verdicts(rows)]
    print("\n".join(said))
    if args.results:
        command = own_command("training_step", arguments)
        flat = [{"contest": title, **row} for title, some in rows.items() for row in some]
        more = ("maxtext",) if args.maxtext else ()
        write_results(args.results, "training_step", command, flat, table + said, *more)
    return MISSED if _PEER in rows and _times(rows[_PEER]) < _GOAL else 0


if __name__ == "__main__":
    run(main)
