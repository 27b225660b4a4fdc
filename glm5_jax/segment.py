"""A segment: equal groups of layers, run as one scan."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from glm5_jax.block import Block, Memory, Report, Setting
from glm5_jax.cache import LayerCache
from glm5_jax.collectives import MESH_AXES, num_shards, spread
from glm5_jax.config import Config
from glm5_jax.experts import ExpertList, Experts
from glm5_jax.layers import SegmentPlan
from glm5_jax.params import stacked
from glm5_jax.selection import Selection
from glm5_jax.sharding import Rules, is_whole, whole

# What to return of a layer, of all that can be seen of it.
Observe = Callable[[Report], Any]


class Segment(nnx.Module):
    """Weights of `plan.count` groups: one stacked block for each slot of the group."""

    def __init__(self, plan: SegmentPlan, config: Config):
        self.plan = plan
        self.config = config
        self.layers = nnx.List([stacked(Block(kind, config), plan.count) for kind in plan.unit])
        # Beside the layers: a scan hands out a layer's weights by copying them, which is right for
        # all but the experts, which are most of the model and are read one by one.
        self.experts = nnx.List(
            [
                stacked(Experts(config), plan.count) if kind.mlp == "moe" else None
                for kind in plan.unit
            ]
        )


Remat = str  # "none", "layers" or "products", as `forward` has it
_KEPT = {"layers": None, "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


def rematerialised(
    layers: Callable[..., Any], remat: Remat, *, in_scan: bool
) -> Callable[..., Any]:
    """Layers whose gradient computes again what is not kept.

    Args:
      in_scan: whether they are the body of a scan, which by itself keeps the compiler from finding
        that it computes something twice.
    """
    if remat == "none":
        return layers
    return jax.checkpoint(layers, prevent_cse=not in_scan, policy=_KEPT[remat])


def _can_teach_in_place(segment: Segment, rules: Rules) -> bool:
    """Whether layers can sum the gradient of their experts right in that of all.

    Not if they are made whole first, or if their gradient is kept in less than it is summed in.
    """
    return all(
        is_whole(experts, Experts(segment.config), rules)
        and all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(experts))
        for experts in segment.experts
        if experts is not None
    )


def run_segment(
    segment: Segment,
    x_BTD: jax.Array,
    selection: Selection,
    caches: tuple[LayerCache, ...] | None,
    setting: Setting,
    *,
    cache_dtype: jnp.dtype,
    page_BW: jax.Array | None,
    carry_selection: bool,
    remat: Remat,
    observe: Observe,
) -> tuple[jax.Array, Selection, tuple[LayerCache, ...] | None, tuple[Any, ...]]:
    """Runs a segment's layers.

    Args:
      selection: of the layer before the segment.
      caches: the segment's part of the cache, by slot; None in a pass without one. With it the
        routed experts have no gradient.
      page_BW: the pages of each row in it, as `KVCache` has them.
      carry_selection: whether a layer of another group needs a selection made in this one. It is
        large, and a scan keeps what it carries for the gradient.

    Returns:
      BTD, the last selection (as given where it is not carried), the caches with the new tokens,
      and by slot what was observed, stacked over the groups.
    """
    config, rules = segment.config, setting.rules
    # Others are handed out by the scan, so that one layer's at a time are whole.
    reads_list = caches is not None or _can_teach_in_place(segment, rules)
    in_a_row = [None if experts is None else experts.in_a_row() for experts in segment.experts]
    experts_here = config.moe.num_experts // num_shards(rules.axes["experts"])
    # Else the scan's transpose would add up zeros of the whole list.
    read = jax.lax.stop_gradient(in_a_row)

    def experts_of(slot: int, group: jax.Array, own: Any, taught: Any) -> ExpertList | None:
        if own is not None:
            return ExpertList.of(whole(own, Experts(config), rules))
        stack = read[slot]
        return None if stack is None else ExpertList(stack, group * experts_here, taught)

    def run_group(carry: Any, scanned: Any) -> tuple[Any, tuple[Any, ...]]:
        x_BTD, selection, caches, taught = carry
        group, blocks, own = scanned
        updated, passed_on, observed = [], [], []
        for slot, (kind, block) in enumerate(zip(segment.plan.unit, blocks, strict=True)):
            block = whole(block, Block(kind, config), rules, x_BTD.dtype)
            if caches is None:
                memory = None
            else:
                memory = Memory(*caches[slot].memory(group, cache_dtype, page_BW))
            experts = experts_of(slot, group, own[slot], taught[slot])
            x_BTD, experts, memory, report = block(x_BTD, experts, memory, selection, setting)
            selection = report.selection
            updated.append(memory.stacks())
            passed_on.append(experts.taught if experts is not None and reads_list else None)
            observed.append(observe(report))
        carried = (
            x_BTD,
            selection if carry_selection else Selection(),
            None if caches is None else tuple(updated),
            tuple(passed_on),
        )
        return carried, tuple(observed)

    run_group = rematerialised(run_group, remat, in_scan=True)
    nothing = (None,) * len(in_a_row)
    # What layers hand on differs along all axes, whichever divide the weights.
    taught = tuple(spread(in_a_row, MESH_AXES)) if reads_list and caches is None else nothing
    start = (x_BTD, selection if carry_selection else Selection(), caches, taught)
    groups = jnp.arange(segment.plan.count)
    scanned = (groups, segment.layers, nothing if reads_list else tuple(segment.experts))
    (x_BTD, last, caches, _), observed = jax.lax.scan(run_group, start, scanned)
    return x_BTD, last if carry_selection else selection, caches, observed
