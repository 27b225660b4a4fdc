"""The plan of a model's layers, cut into segments of equal groups.

A segment is one `jax.lax.scan`, so the time to trace and compile a model depends on the number of
different layer bodies and not on the number of layers.
"""

import dataclasses
from typing import Literal, NamedTuple


class LayerKind(NamedTuple):
    """What sets one decoder layer apart from another.

    `shared` layers have no indexer and attend to the tokens that the nearest preceding `full`
    layer selected (IndexShare, arXiv:2603.12201).
    """

    mlp: Literal["dense", "moe"]
    indexer: Literal["full", "shared"]


@dataclasses.dataclass(frozen=True)
class SegmentPlan:
    """`count` repetitions of the layers in `unit`."""

    unit: tuple[LayerKind, ...]
    count: int

    @property
    def starts_shared(self) -> bool:
        """Whether the first layer needs the selection of the layer before it."""
        return self.unit[0].indexer == "shared"


class LayerPlace(NamedTuple):
    """Where a layer's weights stand: `segments[segment].layers[slot]`, element `group`."""

    segment: int
    slot: int
    group: int


class _Cost(NamedTuple):
    """What a grouping is judged by, most important first."""

    bodies: int  # layer bodies to trace and compile
    segments: int
    shared_starts: int  # each one makes a selection cross a scan boundary


def group_layers(kinds: tuple[LayerKind, ...]) -> tuple[SegmentPlan, ...]:
    """Cuts layers into the segments with the fewest layer bodies in all.

    GLM-5 gives 3 x (dense) + 75 x (moe); GLM-5.2 gives 3 x (dense, full) + 3 x (moe, shared)
    + 18 x (full, shared, shared, shared). Any other order of layers is grouped as well as it can
    be, by dynamic programming over the position of the first cut.
    """
    best: dict[int, tuple[_Cost, SegmentPlan | None, int]] = {len(kinds): (_Cost(0, 0, 0), None, 0)}
    for start in reversed(range(len(kinds))):
        options = []
        for period in range(1, len(kinds) - start + 1):
            unit = kinds[start : start + period]
            end = start
            while kinds[end : end + period] == unit:
                end += period
                plan = SegmentPlan(unit, (end - start) // period)
                rest = best[end][0]
                cost = _Cost(
                    rest.bodies + period,
                    rest.segments + 1,
                    rest.shared_starts + plan.starts_shared,
                )
                options.append((cost, plan, end))
        best[start] = min(options, key=lambda option: option[0])

    segments = []
    start = 0
    while (chosen := best[start])[1] is not None:
        segments.append(chosen[1])
        start = chosen[2]
    return tuple(segments)


def layer_places(segments: tuple[SegmentPlan, ...]) -> tuple[LayerPlace, ...]:
    """The place of every layer, in the order of the layers."""
    return tuple(
        LayerPlace(number, slot, group)
        for number, segment in enumerate(segments)
        for group in range(segment.count)
        for slot in range(len(segment.unit))
    )
