"""Sums of work, memory traffic and communication."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Collective:
    """How often a device takes part, and how many bytes it sends in all."""

    count: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Costs:
    """Sums over one execution on one device.

    `hbm_bytes` is a model. Products, sorts and cumulative sums read their operands and write their
    results; what is gathered or scattered is read and written. All else inside a shard_map, slices
    too, counts as fused into those; outside of one it is a single pass that reads and writes each
    array once.
    """

    flops: Mapping[str, float]  # of products, by the wider operand's dtype: `_product_dtype`
    hbm_bytes: float
    by_axes: Mapping[tuple[str, Axes], Collective]  # kind, mesh axes in the order of the mesh

    @property
    def collectives(self) -> dict[str, Collective]:
        """By kind, over whichever axes."""
        return merged(((kind, part) for (kind, _), part in self.by_axes.items()))

    def __add__(self, other: "Costs") -> "Costs":
        flops = {name: self.flops.get(name, 0.0) + f for name, f in other.flops.items()}
        by_axes = merged((*self.by_axes.items(), *other.by_axes.items()))
        return Costs({**self.flops, **flops}, self.hbm_bytes + other.hbm_bytes, by_axes)

    def times(self, number: float) -> "Costs":
        """The costs of running `number` times."""
        flops = {name: number * f for name, f in self.flops.items()}
        by_axes = {
            key: Collective(number * part.count, number * part.bytes)
            for key, part in self.by_axes.items()
        }
        return Costs(flops, number * self.hbm_bytes, by_axes)


def merged(parts: Iterable[tuple[Any, Collective]]) -> dict[Any, Collective]:
    total: dict[Any, Collective] = {}
    for key, part in parts:
        before = total.get(key, Collective(0.0, 0.0))
        total[key] = Collective(before.count + part.count, before.bytes + part.bytes)
    return total
