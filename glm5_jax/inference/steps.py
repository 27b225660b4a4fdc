"""The compiled steps of generating, on a mesh: reading prompts, and moving on."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding, PartitionSpec

from glm5_jax.cache import KVCache, Pools
from glm5_jax.collectives import BATCH, MODEL, alike, published, share
from glm5_jax.config import Config
from glm5_jax.inference.drafting import propose, row_of
from glm5_jax.inference.request import MOST_ALTERNATIVES, Request
from glm5_jax.inference.sampling import (
    Choices,
    Likelihoods,
    Numbers,
    Seen,
    likelihoods,
    sample,
)
from glm5_jax.model import Glm5, forward, logits, read_ahead
from glm5_jax.sharding import ROWS, Partition

_SHORTEST_PAGE, _SHORTEST_PART = 64, 16  # tokens of a page, and of a shard's part of it
_NARROWEST_TABLE = 8  # pages of a row
_EQUAL = PartitionSpec()  # what every device is given whole
_ROWS: Any = ROWS


class Build(NamedTuple):
    """What steps are compiled for. Every row may be drafted `num_drafts` tokens at a time."""

    config: Config
    partition: Partition
    dtype: jnp.dtype  # of the cache
    num_tokens: int  # ids from here on are not drawn
    num_drafts: int


class State(NamedTuple):
    """What stays on the devices from step to step."""

    pools: Pools
    seen: Seen
    # For each of the tokens that the MTP layer is to read next, the hidden state of the token
    # before it; None without drafts.
    before_BTD: jax.Array | None


class Portion(NamedTuple):
    """Parts of prompts, of which each shard of the batch has some rows."""

    token_RT: Numbers  # int32
    count_R: Numbers  # int32, how many of them are real
    start_R: Numbers  # int32, position of the first
    writable_R: Numbers  # int32, position from which on they are stored
    page_RW: Numbers  # int32, pages of the shard's pool
    row_R: Numbers  # int32, row of the shard's part of the batch

    @classmethod
    def empty(cls, length: int, page_RW: np.ndarray, row_R: np.ndarray) -> "Portion":
        """No tokens, in arrays to be filled in."""
        token_RT = np.zeros((len(row_R), length), np.int32)
        count_R, start_R, writable_R = (np.zeros(len(row_R), np.int32) for _ in range(3))
        return cls(token_RT, count_R, start_R, writable_R, page_RW, row_R)


class Turn(NamedTuple):
    """What the rows of the batch are continued from."""

    token_BT: Numbers  # int32: what MTP is to read, the last of which the model is to read
    num_fresh_B: Numbers  # int32, how many of these are real; 0: only the model, the first one
    length_B: Numbers  # int32, tokens stored; the position of the token that is read next
    page_BW: Numbers  # int32
    active_B: Numbers  # bool
    count_B: Numbers  # int32, which of the row's new tokens comes next, from 1
    choices: Choices
    wants_likelihood_B: Numbers  # bool

    @classmethod
    def of(cls, requests: Sequence[Request | None], page_BW: np.ndarray, num_drafts: int) -> "Turn":
        """What each row's request wants; tokens and counts are to be filled in."""
        num_fresh_B, length_B, count_B = (np.zeros(len(requests), np.int32) for _ in range(3))
        return cls(
            token_BT=np.zeros((len(requests), 1 + num_drafts), np.int32),
            num_fresh_B=num_fresh_B,
            length_B=length_B,
            page_BW=page_BW,
            active_B=np.array([request is not None for request in requests]),
            count_B=count_B,
            choices=Choices.of(requests),
            wants_likelihood_B=np.array(
                [each is not None and each.alternatives is not None for each in requests]
            ),
        )


class Outcome(NamedTuple):
    """New tokens: the first `num_B` of each row."""

    token_BT: jax.Array
    num_B: jax.Array
    likelihoods: Likelihoods  # BT and BTM


class Steps(NamedTuple):
    """The steps. Each uses up the state it is given."""

    begin: Callable[[State, np.ndarray, np.ndarray, np.ndarray, np.ndarray], State]
    read: Callable[[Glm5, State, Portion], State]
    advance: Callable[[Glm5, State, Turn], tuple[State, Outcome]]
    compiled: list[str]  # the name of a step, for every time that it was compiled


@functools.cache
def compiled_steps(build: Build) -> Steps:
    """The steps of a model; they are compiled once for every shape that they meet."""
    config, partition, dtype, num_tokens, num_drafts = build
    rules = partition.rules
    compiled: list[str] = []

    def begin(
        state: State,
        row_S: jax.Array,
        bias_Z: jax.Array,
        in_prompt_Z: jax.Array,
        count_Z: jax.Array,
    ) -> State:
        """Tells what a row has seen; `row_S` is its number in the shard that has it."""
        compiled.append("begin")
        row = share(row_S, BATCH, 0)[0]
        new = (bias_Z, in_prompt_Z, count_Z)
        pairs = zip(state.seen, new, strict=True)
        return state._replace(seen=Seen(*(old.at[row].set(x, mode="drop") for old, x in pairs)))

    def read(model: Glm5, state: State, portion: Portion) -> State:
        compiled.append("read")
        portion = jax.tree.map(lambda each: share(each, BATCH, 0), portion)
        token_RT, count_R, start_R, writable_R, page_RW, row_R = portion
        cache = KVCache(state.pools, start_R, dtype, page_RW, writable_R)
        places = cache.next_places(count_R, token_RT.shape[1])
        output = forward(model, token_RT, places, cache, rules=rules)
        assert output.cache is not None
        if state.before_BTD is None:
            return state._replace(pools=output.cache.pools)
        carried_R1D = state.before_BTD.at[row_R, :1].get(mode="clip")
        before_RTD = jnp.concatenate([carried_R1D, output.hidden_BTD[:, :-1]], axis=1)
        _, cache, _ = read_ahead(model, before_RTD, token_RT, places, output.cache, rules=rules)
        last_R1D = row_of(output.hidden_BTD, count_R - 1)
        before_BTD = state.before_BTD.at[row_R, :1].set(last_R1D, mode="drop")
        return state._replace(pools=cache.pools, before_BTD=before_BTD)

    def advance(model: Glm5, state: State, turn: Turn) -> tuple[State, Outcome]:
        compiled.append("advance")
        turn = jax.tree.map(lambda each: share(each, BATCH, 0), turn)
        cache = KVCache(state.pools, turn.length_B, dtype, turn.page_BW)
        pending_B1 = row_of(turn.token_BT, turn.num_fresh_B - 1)
        read_BT = pending_B1
        if state.before_BTD is not None:

            def draw(hidden_B1D: jax.Array, seen: Seen, count_B: jax.Array) -> jax.Array:
                scores_BZ = published(logits(model, hidden_B1D, rules)[:, 0], (MODEL,), 1)
                return sample(scores_BZ, turn.choices, seen, count_B, num_tokens)

            draft_BN, cache = propose(
                model, state.before_BTD, turn, cache, state.seen, num_drafts, draw, rules
            )
            read_BT = jnp.concatenate([pending_B1, draft_BN], axis=1)
        count_B = jnp.where(turn.active_B, read_BT.shape[1], 0)
        places = cache.next_places(count_B, read_BT.shape[1])
        output = forward(model, read_BT, places, cache, rules=rules)
        assert output.cache is not None
        logits_BTZ = published(logits(model, output.hidden_BTD, rules), (MODEL,), 2)
        seen, outcome = _verified(logits_BTZ, read_BT, turn, state.seen, num_tokens)
        before_BTD = state.before_BTD
        if before_BTD is not None:  # others may be amid their prompts
            active_B11 = turn.active_B[:, None, None]
            before_BTD = jnp.where(active_B11, output.hidden_BTD, before_BTD)
        outcome = jax.tree.map(lambda each: published(each, BATCH, 0), outcome)
        return State(output.cache.pools, seen, before_BTD), outcome

    specs = state_specs(build)
    weights = partition.specs(Glm5(config))

    kept = _formats(build)

    def compile_step(step: Any, in_specs: Any, out_specs: Any) -> Any:
        """The state, wherever it stands, comes back in the memory and the order it came in."""
        step = partition.on_shards(step, in_specs, out_specs)
        came = tuple(kept if part is specs else None for part in in_specs)
        left = kept if out_specs is specs else (kept, None)
        donated = in_specs.index(specs)
        return jax.jit(step, donate_argnums=donated, in_shardings=came, out_shardings=left)

    return Steps(
        compile_step(begin, (specs, *[_EQUAL] * 4), specs),
        compile_step(read, (weights, specs, _EQUAL), specs),
        compile_step(advance, (weights, specs, _EQUAL), (specs, _EQUAL)),
        compiled,
    )


def _verified(
    logits_BTZ: jax.Array, read_BT: jax.Array, turn: Turn, seen: Seen, num_tokens: int
) -> tuple[Seen, Outcome]:
    """Draws the tokens after those read, up to the first that is not as it was drafted.

    The first of the tokens read is given, the others are drafts. Each new token is drawn from the
    model's own scores, with the noise that a single step would have; a draft counts only by being
    that very token. So the text is the one that there would be without drafts, but for rounding.

    Source: Daliri, Musco and Suresh, arXiv:2408.07978, on coupling by shared noise.
    """
    most = min(MOST_ALTERNATIVES, num_tokens)
    length = read_BT.shape[1]
    # After the last one nothing is drafted that could match.
    expected_BT = jnp.concatenate([read_BT[:, 1:], jnp.full_like(read_BT[:, :1], -1)], axis=1)

    def draw_next(carry: Any, scanned: Any) -> tuple[Any, Any]:
        seen, is_alive_B = carry
        ahead, logits_BZ, expected_B = scanned
        token_B = sample(logits_BZ, turn.choices, seen, turn.count_B + ahead, num_tokens)
        seen = seen.having(token_B, is_alive_B)
        found = likelihoods(logits_BZ, token_B, turn.wants_likelihood_B, num_tokens, most)
        return (seen, is_alive_B & (token_B == expected_B)), (token_B, is_alive_B, found)

    start = alike((seen, turn.active_B), logits_BTZ)[0]
    scanned = (jnp.arange(length), jnp.moveaxis(logits_BTZ, 1, 0), expected_BT.T)
    (seen, _), drawn = jax.lax.scan(draw_next, start, scanned)
    token_BT, is_new_BT, found = jax.tree.map(lambda each: jnp.moveaxis(each, 0, 1), drawn)
    return seen, Outcome(token_BT, jnp.sum(is_new_BT, axis=1), found)


def page_size_for(partition: Partition) -> int:
    """Tokens of a page: short enough to waste little, long enough to be read at once."""
    shards = partition.num_shards((MODEL,))
    return max(-(-_SHORTEST_PAGE // shards), _SHORTEST_PART) * shards


def table_width(num_pages: int) -> int:
    """So many pages rounded up to a power of two, so that few widths are compiled."""
    return max(_NARROWEST_TABLE, 1 << (num_pages - 1).bit_length())


def empty_state(build: Build, batch: int, num_pages: int, page_size: int) -> State:
    """The state before anything is read.

    Args:
      num_pages: of all shards of the batch together.
    """
    create = functools.partial(_create, build, batch, num_pages, page_size)
    return jax.jit(create, out_shardings=_formats(build))()


def abstract_state(build: Build, batch: int, num_pages: int, page_size: int) -> State:
    """Shapes, dtypes and shardings of the state."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(lambda: _create(build, batch, num_pages, page_size)),
        _shardings(build),
    )


def state_specs(build: Build) -> State:
    """The mesh axes that divide the state."""
    pools = Pools.specs(build.config, with_mtp=build.num_drafts > 0)
    return State(pools, Seen(_ROWS, _ROWS, _ROWS), _ROWS if build.num_drafts else None)


def _create(build: Build, batch: int, num_pages: int, page_size: int) -> State:
    config, drafts = build.config, build.num_drafts
    shape = (batch, config.vocab_size)
    pools = Pools.create(config, num_pages, page_size, build.dtype, with_mtp=drafts > 0)
    seen = Seen(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, bool), jnp.zeros(shape, jnp.int32))
    before_BTD = jnp.zeros((batch, drafts + 1, config.dim), build.dtype) if drafts else None
    return State(pools, seen, before_BTD)


def _shardings(build: Build) -> Any:
    mesh = build.partition.mesh
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), state_specs(build))


def _formats(build: Build) -> Any:
    """Shardings, and the order in which the pools lie in memory: that of their axes.

    Left to itself XLA's TPU backend keeps them in another order than its loop over layers wants
    them in, and copies the whole of the cache twice in every step.
    """
    shapes = abstract_state(build, 1, 1, page_size_for(build.partition))

    def row_major(leaf: jax.ShapeDtypeStruct) -> Format:
        return Format(Layout(tuple(range(leaf.ndim))), leaf.sharding)

    return _shardings(build)._replace(pools=jax.tree.map(row_major, shapes.pools))
