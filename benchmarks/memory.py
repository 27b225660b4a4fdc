"""The most memory that reading a long prompt takes, beside transformers', weights included."""

from typing import Any, NamedTuple

from benchmarks import ours, peer
from benchmarks.arguments import MISSED, parser, run
from benchmarks.contest import contender
from benchmarks.output import own_command, write_results
from benchmarks.peer import Setting
from benchmarks.workload import Work, checkpoint

_LENGTHS = (8192, 16384)
_MOST_BYTES, _MOST_GROWTH = 2e9, 2.2  # at the first length, and from there to the second
_SETTING = Setting("sdpa", "grouped_mm")  # keeps no scores where it can


class Peak(NamedTuple):
    """The most that a process had at once, in bytes."""

    who: str
    length: int
    bytes: float


def measure(length: int, with_peer: bool) -> list[Peak]:
    """Each in a process of its own, which has run once before."""
    work = Work("prefill", "bench", "float32", 1, length)
    makers: dict[str, tuple[Any, ...]] = {"here": (ours.make, checkpoint(work.preset), work)}
    if with_peer:
        makers["transformers"] = (peer.make, checkpoint(work.preset), work, _SETTING)
    peaks = []
    for who, maker in makers.items():
        with contender(*maker) as each:
            peaks.append(Peak(who, length, each.peak()))
    return peaks


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and writes; MISSED if it takes more than it may."""
    args = parser(__doc__).parse_args(arguments)
    peaks = [peak for length in _LENGTHS for peak in measure(length, length == _LENGTHS[0])]
    table = ["| program | tokens read | most memory, GB |", "|---|---|---|"]
    table += [f"| {peak.who} | {peak.length:,} | {peak.bytes / 1e9:.2f} |" for peak in peaks]
    short, long = (peak.bytes for peak in peaks if peak.who == "here")
    table += [
        "",
        f"From {_LENGTHS[0]:,} to {_LENGTHS[1]:,} tokens: {long / short:.2f} times (at most "
        f"{_MOST_GROWTH:g}); at {_LENGTHS[0]:,} at most {_MOST_BYTES / 1e9:g} GB.",
    ]
    print("\n".join(table))
    if args.results:
        command = own_command("memory", arguments)
        rows = [peak._asdict() for peak in peaks]
        write_results(args.results, "memory", command, rows, table, "torch", "transformers")
    return MISSED if short > _MOST_BYTES or long > _MOST_GROWTH * short else 0


if __name__ == "__main__":
    run(main)
