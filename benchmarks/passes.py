"""What one device does in a pass of the model, told apart by tracing variants of it.

The pass is traced at its full size, with shapes for arguments, and the FLOPs of the products in the
trace are counted. The variants:

    selecting        as the model is
    narrow           selecting a single token: attention to selected tokens is linear in their
                     number and nothing else depends on it, so two numbers give its cost
    half             selecting half as many, which shows whether that is so
    selecting, all   attending to all visible tokens, though indexers select
    all              selecting as many tokens as there are, which asks no indexer
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glm5_jax.cache import KVCache
from glm5_jax.collectives import MODEL, published
from glm5_jax.config import Config
from glm5_jax.errors import InputError
from glm5_jax.inference.engine import PORTIONS
from glm5_jax.model import Glm5, forward, logits
from glm5_jax.params import abstract
from glm5_jax.plan.chips import CHIPS
from glm5_jax.plan.costs import count
from glm5_jax.plan.programs import loop_trips
from glm5_jax.plan.tally import Costs
from glm5_jax.sharding import ROWS, Partition

PORTION = PORTIONS[-1]  # tokens of a prompt that are read at once
CHIP = "v5p"  # whose rates turn FLOPs into time

Variant = Literal["selecting", "narrow", "half", "selecting, all", "all"]


class Pass(NamedTuple):
    """The last `length` tokens of a context read at once; a single one also gets predictions."""

    length: int
    context: int


class Parts(NamedTuple):
    """What a pass does, each in FLOPs or in seconds."""

    attention: float  # to the selected tokens, without projections
    attention_to_all: float  # instead, with what it takes to form keys and values
    indexers: float
    rest: float

    @property
    def cut(self) -> float:
        """The share of attention that selecting saves, the indexers' own work left out."""
        return 1 - self.attention / self.attention_to_all

    @property
    def indexers_of_all(self) -> float:
        """The indexers' work beside attention to all."""
        return self.indexers / self.attention_to_all

    @property
    def indexers_of_selected(self) -> float:
        """The indexers' work beside attention to the selected tokens."""
        return self.indexers / self.attention


class Counter:
    """Counts passes of one model on a partition of one device."""

    def __init__(self, config: Config, partition: Partition, platform: str):
        self.config = config
        self.partition = partition
        self.platform = platform
        self._known: dict[tuple[Config, Pass, bool], Costs] = {}

    def costs(self, asked: Pass, variant: Variant = "selecting") -> Costs:
        """All that a pass does."""
        topk = self.config.indexer.topk
        topk = {"narrow": 1, "half": topk // 2, "all": asked.context}.get(variant, topk)
        config = dataclasses.replace(
            self.config, indexer=dataclasses.replace(self.config.indexer, topk=topk)
        )
        return self._costs(config, asked, variant == "selecting, all")

    def costs_with_experts(self, asked: Pass, experts_per_token: int) -> Costs:
        """All that a pass does where tokens have another number of experts."""
        moe = dataclasses.replace(self.config.moe, experts_per_token=experts_per_token)
        return self._costs(dataclasses.replace(self.config, moe=moe), asked, False)

    def _costs(self, config: Config, asked: Pass, attend_to_all: bool) -> Costs:
        key = config, asked, attend_to_all
        if key not in self._known:
            self._known[key] = self._count(*key)
        return self._known[key]

    def _count(self, config: Config, asked: Pass, attend_to_all: bool) -> Costs:
        partition, dtype = self.partition, jnp.dtype(config.dtype)
        weights = abstract(Glm5(config), dtype, partition.sharding)
        specs = KVCache.specs(config, dtype)
        cache = jax.tree.map(
            lambda leaf, spec: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=jax.NamedSharding(partition.mesh, spec)
            ),
            jax.eval_shape(lambda: KVCache.create(config, 1, asked.context, dtype)),
            specs,
        )
        by_row = jax.NamedSharding(partition.mesh, ROWS)
        tokens = jax.ShapeDtypeStruct((1, asked.length), jnp.int32, sharding=by_row)

        def step(model: Glm5, cache: KVCache, token_BT: jax.Array) -> Any:
            places = cache.next_places(jnp.full(1, asked.length, jnp.int32), asked.length)
            output = forward(model, token_BT, places, cache, attend_to_all=attend_to_all)
            if asked.length > 1:
                return output.cache
            return output.cache, published(logits(model, output.hidden_BTD), (MODEL,), 2)

        returned = specs if asked.length > 1 else (specs, ROWS)
        with jax.set_mesh(partition.mesh):
            given = (partition.specs(Glm5(config)), specs, ROWS)
            traced = jax.jit(partition.on_shards(step, given, returned)).trace(
                weights, cache, tokens
            )
        trips = loop_trips(config, partition, asked.length)
        return count(traced.jaxpr, partition.mesh.shape, loop_trips=trips, platform=self.platform)


def flops(costs: Costs) -> float:
    """FLOPs of products, whatever they are of."""
    return sum(costs.flops.values())


def seconds(costs: Costs) -> float:
    """Of products at a v5p's published rates: one in float32 to the highest precision takes six."""
    chip = CHIPS[CHIP]
    return sum(number / chip.rate(dtype) for dtype, number in costs.flops.items())


def parts(counter: Counter, asked: Pass, measure: Any = flops) -> Parts:
    """What a pass is made of that sees more tokens than it selects.

    Raises:
      InputError: its work is not linear in the number of selected tokens.
    """
    topk = counter.config.indexer.topk
    variants: tuple[Variant, ...] = ("selecting", "narrow", "half", "selecting, all", "all")
    selecting, narrow, half, selecting_all, to_all = (
        measure(counter.costs(asked, variant)) for variant in variants
    )
    each = (selecting - narrow) / (topk - 1)
    if each <= 0 or not math.isclose(half - narrow, each * (topk // 2 - 1), rel_tol=1e-3):
        raise InputError(
            f"{asked}: selecting 1, {topk // 2} and {topk} tokens takes {narrow:.4g}, {half:.4g} "
            f"and {selecting:.4g}, expected work that grows in proportion to them"
        )
    attention = each * topk
    indexers = selecting_all - to_all
    rest = selecting - attention - indexers
    return Parts(attention, to_all - rest, indexers, rest)


class Request(NamedTuple):
    """What a whole request takes."""

    reading: float
    generating: float

    @property
    def whole(self) -> float:
        return self.reading + self.generating


def request(
    counter: Counter, variant: Variant, context: int, new: int, every: int, measure: Any = flops
) -> Request:
    """Reading a prompt, a portion at a time, and then generating.

    Passes are traced at some contexts, between which what they take is interpolated. Attending to
    all, every portion forms the keys and values of all tokens anew, which reading the prompt at
    once would not: here they count once.

    Args:
      context: tokens at the end, of which the last `new` are generated.
    """
    most = counter.config.indexer.topk
    traced = sorted({PORTION, min(most, context), *range(every, context, every), context})

    def total(length: int, contexts: range) -> float:
        asked = [Pass(length, at) for at in traced if at >= length]
        found = [measure(counter.costs(each, variant)) for each in asked]
        at = [each.context for each in asked]
        return float(np.interp(np.array(contexts), at, found).sum())

    ends = range(PORTION, context - new + 1, PORTION)
    reading = total(PORTION, ends)
    if variant == "all":
        reading -= formed_per_token(counter, context, measure) * (sum(ends) - ends[-1])
    return Request(reading, total(1, range(context - new + 1, context + 1)))


def formed_per_token(counter: Counter, context: int, measure: Any = flops) -> float:
    """What a portion that attends to all takes for each token, whatever its own length.

    Of what grows with the context, one part grows with the portion too, and the other is this.
    """

    def growth(length: int) -> float:
        ends = (context // 2, context)
        half, whole = (measure(counter.costs(Pass(length, end), "all")) for end in ends)
        return (whole - half) / (context - context // 2)

    return 2 * growth(PORTION) - growth(2 * PORTION)


def expert_share(counter: Counter) -> float:
    """The share of all experts' parameters that one token's products are with."""
    moe, asked = counter.config.moe, Pass(1, PORTION)
    few, fewer = moe.experts_per_token, moe.experts_per_token // 2
    extra = flops(counter.costs(asked)) - flops(counter.costs_with_experts(asked, fewer))
    layers = sum(kind.mlp == "moe" for kind in counter.config.layers)
    all_experts = layers * moe.num_experts * 3 * counter.config.dim * moe.ffn
    return extra / 2 * few / (few - fewer) / all_experts
