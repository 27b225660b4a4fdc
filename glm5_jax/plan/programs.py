"""The steps that plans are made of: the same functions that run, with shapes for arguments."""

import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from glm5_jax.collectives import BATCH
from glm5_jax.config import Config
from glm5_jax.errors import InputError
from glm5_jax.experts import BLOCK_LOOP, expected_blocks
from glm5_jax.inference.generate import PREFILL_LENGTH, capacity_for
from glm5_jax.inference.steps import abstract_state, compiled_steps
from glm5_jax.model import Glm5
from glm5_jax.params import abstract
from glm5_jax.sharding import DECODE, Partition, Rules

# Packages that train models add their step here, by the name of its job.
_JOBS_OF_OTHERS = "glm5_jax.jobs"


class Work(NamedTuple):
    """What a step is asked to do."""

    batch: int  # rows, of all devices
    context: int  # tokens of a row
    dtype: str | None  # of weights and activations; the job's own choice unless given


class Program(NamedTuple):
    """A step that can be compiled."""

    function: Any  # jitted
    arguments: tuple[Any, ...]  # shapes, with shardings
    parts: Mapping[str, Any]  # the arguments that memory goes to, by what they are
    tokens: int  # that the step deals with, on all devices
    loop_trips: Mapping[str, float]


class Job(NamedTuple):
    """A kind of step."""

    rules: Rules
    program: Callable[[Config, Partition, Work], Program]

    @property
    def interchangeable(self) -> bool:
        """Whether the axes `data` and `expert` mean the same."""
        return set(self.rules.axes["experts"]) == set(BATCH)


def find_job(name: str) -> Job:
    """The job of a name.

    Raises:
      InputError: there is none.
    """
    jobs = {"decode": Job(DECODE, _decode), "prefill": Job(DECODE, _prefill)}
    others = importlib.metadata.entry_points(group=_JOBS_OF_OTHERS)
    if name in jobs:
        return jobs[name]
    if name not in others.names:
        known = ", ".join([*jobs, *sorted(others.names)])
        raise InputError(f"--job is {name!r:.40}, expected one of {known}")
    job: Job = others[name].load()
    return job


def loop_trips(config: Config, partition: Partition, num_tokens: int) -> dict[str, float]:
    """How often a device runs the loop over blocks of rows of one expert, tokens choosing evenly.

    Args:
      num_tokens: of all devices, in one pass.
    """
    moe, axes = config.moe, partition.rules.axes["experts"]
    meeting = num_tokens // partition.num_shards(tuple(set(BATCH) - set(axes)))
    kept = moe.num_experts // partition.num_shards(axes)
    return {BLOCK_LOOP: expected_blocks(meeting * moe.experts_per_token, moe.num_experts, kept)}


def _decode(config: Config, partition: Partition, work: Work) -> Program:
    """One token of each row, after the rest of the context."""
    return _read(config, partition, work, 1)


def _prefill(config: Config, partition: Partition, work: Work) -> Program:
    """One portion of each row, the last of the context and so the slowest."""
    return _read(config, partition, work, min(PREFILL_LENGTH, work.context))


def _read(config: Config, partition: Partition, work: Work, length: int) -> Program:
    dtype = jnp.dtype(work.dtype or config.dtype)
    blueprint = Glm5(config)
    weights = abstract(blueprint, dtype, partition.sharding)
    capacity = capacity_for(work.context, partition)
    state = abstract_state(config, partition, work.batch, capacity, dtype)
    tokens_BT = jax.ShapeDtypeStruct((work.batch, length), jnp.int32)
    count_B = jax.ShapeDtypeStruct((work.batch,), jnp.int32)
    return Program(
        compiled_steps(config, partition, dtype, config.vocab_size).read,
        (weights, state, tokens_BT, count_B),
        {"weights": weights, "cache": state.cache},
        work.batch * length,
        loop_trips(config, partition, work.batch * length),
    )
