"""The steps that plans are made of: the same functions that run, with shapes for arguments."""

import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from glm5_jax import quantization
from glm5_jax.collectives import BATCH, MODEL
from glm5_jax.config import Config
from glm5_jax.dispatch import expected_blocks
from glm5_jax.errors import InputError
from glm5_jax.experts import BLOCK_LOOP
from glm5_jax.held import HELD_LOOP
from glm5_jax.indexer import PAGE_LOOP, pages_of_block
from glm5_jax.inference.engine import PORTIONS
from glm5_jax.inference.sampling import Choices
from glm5_jax.inference.steps import (
    Build,
    Portion,
    State,
    Turn,
    abstract_state,
    compiled_steps,
    page_size_for,
    table_width,
)
from glm5_jax.model import Glm5
from glm5_jax.params import abstract
from glm5_jax.quantization import SCHEMES
from glm5_jax.sharding import DECODE, Partition, Rules
from glm5_jax.topk import EXPECTED_HALVINGS, HALVING_LOOP

# Packages that train models add their step here, by the name of its job.
_JOBS_OF_OTHERS = "glm5_jax.jobs"


class Work(NamedTuple):
    """What a step is asked to do."""

    batch: int  # rows, of all devices
    context: int  # tokens of a row
    dtype: str | None  # of weights and activations; the job's own choice unless given
    scheme: str | None = None  # by which weights are kept in few bits


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
    """How often a device runs loops whose length depends on data, tokens choosing experts evenly.

    Args:
      num_tokens: of all devices, in one pass.
    """
    moe, axes = config.moe, partition.rules.axes["experts"]
    meeting = num_tokens // partition.num_shards(tuple(set(BATCH) - set(axes)))
    kept = moe.num_experts // partition.num_shards(axes)
    blocks = expected_blocks(meeting * moe.experts_per_token, moe.num_experts, kept)
    return {BLOCK_LOOP: blocks, HALVING_LOOP: EXPECTED_HALVINGS}


def _decode(config: Config, partition: Partition, work: Work) -> Program:
    """One token of each row, after the rest of the context."""
    build, weights, state, pages = _start(config, partition, work)
    row = jax.ShapeDtypeStruct((work.batch,), jnp.int32)
    turn = Turn(
        token_BT=jax.ShapeDtypeStruct((work.batch, 1), jnp.int32),
        num_fresh_B=row,
        length_B=row,
        page_BW=pages,
        active_B=jax.ShapeDtypeStruct((work.batch,), bool),
        count_B=row,
        choices=jax.eval_shape(lambda: Choices.of([None] * work.batch)),
        wants_likelihood_B=jax.ShapeDtypeStruct((work.batch,), bool),
    )
    step = compiled_steps(build).advance
    return _program(step, weights, state, turn, work.batch, config, partition)


def _prefill(config: Config, partition: Partition, work: Work) -> Program:
    """One portion of each row, the last of the context and so the slowest."""
    build, weights, state, pages = _start(config, partition, work)
    length = min(PORTIONS[-1], work.context)
    row = jax.ShapeDtypeStruct((work.batch,), jnp.int32)
    portion = Portion(
        token_RT=jax.ShapeDtypeStruct((work.batch, length), jnp.int32),
        count_R=row,
        start_R=row,
        writable_R=row,
        page_RW=pages,
        row_R=row,
    )
    step = compiled_steps(build).read
    return _program(step, weights, state, portion, work.batch * length, config, partition)


def _start(
    config: Config, partition: Partition, work: Work
) -> tuple[Build, Glm5, State, jax.ShapeDtypeStruct]:
    """What to compile for, the weights, the state, and the pages of every row."""
    dtype = jnp.dtype(work.dtype or config.dtype)
    build = Build(config, partition, dtype, config.vocab_size, num_drafts=0)
    if work.scheme is None:
        weights = abstract(Glm5(config), dtype, partition.sharding)
    else:
        scheme = SCHEMES[work.scheme]
        weights = quantization.abstract(Glm5(config), scheme, dtype, partition)
    page_size = page_size_for(partition)
    num_pages = -(-work.context // page_size)
    state = abstract_state(build, work.batch, work.batch * num_pages, page_size)
    table_BW = jax.ShapeDtypeStruct((work.batch, table_width(num_pages)), jnp.int32)
    return build, weights, state, table_BW


def _program(
    step: Any,
    weights: Glm5,
    state: State,
    asked: Any,
    num_tokens: int,
    config: Config,
    partition: Partition,
) -> Program:
    trips = loop_trips(config, partition, num_tokens)
    if isinstance(asked, Turn):
        batch, width = asked.page_BW.shape
        page_part = page_size_for(partition) // partition.num_shards((MODEL,))
        page_bytes = page_part * config.indexer.head_dim * weights.embedding.dtype.itemsize
        batch //= partition.num_shards(BATCH)
        trips[PAGE_LOOP] = width / pages_of_block(batch, width, page_bytes)
    trips[HELD_LOOP] = 1.0  # a block holds twice an equal share of what is selected
    parts = {"weights": weights, "cache": state.pools}
    return Program(step, (weights, state, asked), parts, num_tokens, trips)
