"""What sparse attention and sparse experts are said to save, in the full model's own program.

`python -m benchmarks.claims --results benchmarks/results`; ends with 1 if a claim does not hold.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks.arguments import parser, run
from benchmarks.output import own_command, write_results
from benchmarks.passes import (
    CHIP,
    PORTION,
    Counter,
    Pass,
    expert_share,
    flops,
    formed_per_token,
    parts,
    request,
    seconds,
)
from glm5_jax.collectives import MESH_AXES
from glm5_jax.mesh import make_mesh
from glm5_jax.plan.topology import find_topology
from glm5_jax.presets import load_preset
from glm5_jax.sharding import DECODE, Partition

_PRESETS, _PACKAGES = ("glm-5", "glm-5.2"), ("libtpu",)
CONTEXT = 2**17
_NEW = 1024  # of these tokens are generated
_EVERY = 8192  # tokens of context that a pass is traced


class Claim(NamedTuple):
    """A line of the table; without bounds it is a number to know."""

    preset: str
    claim: str
    counted: float
    least: float | None = None
    most: float | None = None

    @property
    def holds(self) -> bool | None:
        """None where nothing is claimed."""
        if self.least is None and self.most is None:
            return None
        above = self.least is None or self.counted >= self.least
        return above and (self.most is None or self.counted <= self.most)


def claims(
    preset: str, counter: Counter, context: int = CONTEXT, new: int = _NEW, every: int = _EVERY
) -> Iterator[Claim]:
    """All claims of one model, and what else there is to know."""
    claim, topk = functools.partial(Claim, preset), counter.config.indexer.topk
    one, portion = Pass(1, context), Pass(PORTION, context)
    found = parts(counter, one)
    at = f"token {context:,}, {topk:,} selected"
    yield claim(f"attention of {at}: work cut by 98% or more", found.cut, least=0.98)
    yield claim(f"indexers of {at}, as a share of attention to all", found.indexers_of_all)
    yield claim("the same, as a share of attention to those selected", found.indexers_of_selected)
    timed = parts(counter, one, seconds)
    yield claim(f"the same in a {CHIP}'s time for products", timed.indexers_of_selected)

    found = parts(counter, portion)
    at = f"the last {portion.length} of {context:,} tokens, read at once"
    yield claim(f"attention of {at}: work cut by", found.cut)
    formed = formed_per_token(counter, context) * context
    known = found._replace(attention_to_all=found.attention_to_all - formed)
    yield claim("the same, if keys and values of earlier tokens need not be formed", known.cut)
    yield claim(f"indexers of {at}, as a share of attention to all", found.indexers_of_all)
    yield claim("the same, as a share of attention to those selected", found.indexers_of_selected)

    def saved(measure: Any) -> tuple[float, float, float]:
        few = request(counter, "selecting", context, new, every, measure)
        many = request(counter, "all", context, new, every, measure)
        reading, generating = (1 - a / b for a, b in zip(few, many, strict=True))
        return 1 - few.whole / many.whole, reading, generating

    whole, reading, generating = saved(flops)
    text = f"{context - new:,} tokens read, {new:,} generated"
    yield claim(f"all work of a request, {text}: cut by 40% or more", whole, least=0.4)
    yield claim("the same, of reading alone", reading)
    yield claim("the same, of generating alone", generating)
    yield claim(f"the same of all, in a {CHIP}'s time for products", saved(seconds)[0])
    moe = counter.config.moe
    text = f"{moe.experts_per_token} of {moe.num_experts} experts: about 3% of their parameters"
    yield claim(text, expert_share(counter), least=0.025, most=0.035)


def _lines(found: list[Claim]) -> Iterator[str]:
    yield "| model | claim | counted | holds |"
    yield "|---|---|---|---|"
    verdicts = {None: "not claimed", True: "yes", False: "**no**"}
    for each in found:
        yield f"| {each.preset} | {each.claim} | {each.counted:.2%} | {verdicts[each.holds]} |"
    yield ""
    yield (
        "FLOPs of the products in the model's own program, traced at full size for one device of a "
        "v5p. A single token attends in the latent space, to all or to those selected, so that "
        "work is cut as the number of tokens is. A portion of a prompt attends to all with keys "
        "and values by head, which takes less for each pair of tokens than the latent space does, "
        "but forms them of all tokens anew; a request counts forming them once."
    )


def _devices() -> Sequence[Any]:
    return find_topology(f"{CHIP}:2x2x1").devices  # the smallest there is


def main(arguments: list[str] | None = None) -> int:
    """Counts, prints and writes; returns 1 if a claim does not hold."""
    args = parser(__doc__).parse_args(arguments)
    mesh = make_mesh(dict.fromkeys(MESH_AXES, 1), _devices()[:1])
    found: list[Claim] = []
    for preset in _PRESETS:
        counter = Counter(load_preset(preset).config, Partition(mesh, DECODE), "tpu")
        found += claims(preset, counter)
    lines = list(_lines(found))
    print("\n".join(lines))
    if args.results is not None:
        rows = [each._asdict() | {"holds": each.holds} for each in found]
        command = own_command("claims", arguments)
        write_results(args.results, "claims", command, rows, lines, *_PACKAGES)
    return 1 if any(each.holds is False for each in found) else 0


if __name__ == "__main__":
    run(main)
