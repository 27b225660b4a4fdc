"""What a step takes on a topology: memory by what it is for, work, communication, and time."""

import dataclasses
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from glm5_jax.collectives import MESH_AXES, standing_in_for
from glm5_jax.config import Config
from glm5_jax.mesh import Sizes, make_mesh
from glm5_jax.model import Glm5
from glm5_jax.params import leaves_by_path
from glm5_jax.plan.costs import count
from glm5_jax.plan.programs import Job, Program, Work
from glm5_jax.plan.tally import Axes, Costs
from glm5_jax.plan.topology import Topology, silenced
from glm5_jax.sharding import Partition, require_divisible

# What libtpu says that a program needs, arguments included though it speaks of temporaries.
_NEEDED = re.compile(r"(?:Used |temporaries \()([\d.]+)([KMGT])")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# Parts of the model, by what the paths of their weights have in them; the first that fits.
_WEIGHTS = {
    "routed experts": ".experts.",
    "shared experts": ".shared.",
    "routers": ".router.",
    "indexers": ".indexer.",
    "attention": ".attention.",
    "dense feed-forward": ".mlp.",
    "embedding": ".embedding.",
    "head": ".head.",
    "norms and MTP join": ".",
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a step; memory and work are a chip's, in bytes, FLOPs and seconds."""

    mesh: Sizes
    tokens: int  # of all chips
    memory: Mapping[str, float]  # of arguments, by what they are
    weights: Mapping[str, float]  # by part of the model
    limit: float  # that a program can have
    costs: Costs
    seconds: Mapping[str, float]  # by what it is bound by
    tokens_per_second: float
    compiled: Mapping[str, Any] | None = None  # peak, fits, reason, seconds; None if not compiled

    @property
    def arguments(self) -> float:
        """Memory of all arguments."""
        return sum(self.memory.values())

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def peak(self) -> float | None:
        """The most memory in use at once; None if not compiled, or the compiler gave up."""
        return self.compiled["peak"] if self.compiled else None

    @property
    def temporaries(self) -> float | None:
        """What a step needs beside its arguments, at the peak; None as that is."""
        return None if self.peak is None else self.peak - self.arguments

    @property
    def fits(self) -> bool | None:
        """Whether it fits; None if that is not known without compiling."""
        if self.arguments > self.limit:
            return False
        return None if self.compiled is None else bool(self.compiled["fits"])


def estimate(
    config: Config, job: Job, topology: Topology, sizes: Sizes, work: Work
) -> tuple[Plan, Any]:
    """Traces a step, without compiling it.

    Returns:
      The plan, and what `compile_plan` compiles.

    Raises:
      InputError: the mesh does not divide the model or the batch.
    """
    blueprint = Glm5(config)
    require_divisible(blueprint, job.rules, sizes, work.batch)
    partition = Partition(make_mesh(sizes, topology.devices), job.rules)
    # By the kind of device the program chooses how it is computed; a CPU may stand in for a GPU.
    kind = "gpu" if topology.platform == "cuda" else topology.platform
    with jax.set_mesh(partition.mesh), standing_in_for(kind):
        program = job.program(config, partition, work)
        traced = program.function.trace(*program.arguments)
    per_chip = topology.chip.devices
    device_costs = count(
        traced.jaxpr,
        partition.mesh.shape,
        loop_trips=program.loop_trips,
        platform=topology.platform,
    )
    seconds = _roofline(device_costs, topology, partition)
    tokens_per_second = program.tokens / max(seconds.values()) / topology.num_chips
    plan = Plan(
        mesh=sizes,
        tokens=program.tokens,
        memory={name: per_chip * _bytes(part) for name, part in _parts(program).items()},
        weights={name: per_chip * size for name, size in _by_part(program).items()},
        limit=float(topology.chip.usable_hbm_bytes),
        costs=device_costs.times(per_chip),
        seconds=seconds,
        tokens_per_second=tokens_per_second,
    )
    return plan, (traced, partition.mesh)


def compile_plan(plan: Plan, traced: Any, topology: Topology) -> Plan:
    """Compiles what was traced; that it does not fit is a finding, not an error."""
    program, mesh = traced
    began = time.perf_counter()
    try:
        with silenced(), jax.set_mesh(mesh):
            stats = program.lower().compile().memory_analysis()
        # Arguments that the step does not use stay in memory, but are none of the program's.
        unused = max(0.0, plan.arguments - topology.chip.devices * stats.argument_size_in_bytes)
        peak_of_device = stats.peak_memory_in_bytes
        if topology.platform != "tpu":  # XLA leaves temporaries out of the peak that it has for CPU
            peak_of_device = stats.argument_size_in_bytes + stats.temp_size_in_bytes
            peak_of_device += stats.output_size_in_bytes - stats.alias_size_in_bytes
        peak = topology.chip.devices * peak_of_device + unused
        found: dict[str, Any] = {"peak": peak, "fits": peak <= plan.limit, "reason": None}
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = _NEEDED.search(str(error))
        peak_or_none = None
        if needed:
            peak_or_none = topology.chip.devices * float(needed[1]) * _UNITS[needed[2]]
        reason = str(error).partition("\n")[0]
        found = {"peak": peak_or_none, "fits": False, "reason": reason}
    return dataclasses.replace(plan, compiled=found | {"seconds": time.perf_counter() - began})


def _parts(program: Program) -> dict[str, Any]:
    """The arguments by what they are; all that is not named is other."""
    named = {id(leaf) for part in program.parts.values() for leaf in jax.tree.leaves(part)}
    others = [leaf for leaf in jax.tree.leaves(program.arguments) if id(leaf) not in named]
    return {**program.parts, "other arguments": others}


def _bytes(tree: Any) -> float:
    """What one device holds of arrays; those without a sharding whole."""
    total = 0.0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * leaf.dtype.itemsize
    return total


def _by_part(program: Program) -> dict[str, float]:
    sizes = dict.fromkeys(_WEIGHTS, 0.0)
    leaves = program.parts["weights"]
    for path, leaf in (leaves if isinstance(leaves, dict) else leaves_by_path(leaves)).items():
        name = next(name for name, part in _WEIGHTS.items() if part in f".{path}.")
        sizes[name] += _bytes(leaf)
    return sizes


def _roofline(costs: Costs, topology: Topology, partition: Partition) -> dict[str, float]:
    """The seconds that each resource would take alone; together it is at least the longest."""
    chip = topology.chip.per_device
    return {
        "compute": sum(flops / chip.rate(dtype) for dtype, flops in costs.flops.items()),
        "HBM": costs.hbm_bytes / chip.hbm_bandwidth,
        "interconnect": sum(
            part.bytes / topology.bandwidth(_group(partition, axes))
            for (_, axes), part in costs.by_axes.items()
        ),
    }


def _group(partition: Partition, axes: Axes) -> list[Any]:
    """Devices that exchange with each other along the axes."""
    place = tuple(slice(None) if axis in axes else 0 for axis in MESH_AXES)
    return list(np.atleast_1d(partition.mesh.devices[place]).flat)
