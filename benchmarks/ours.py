"""This project's programs, as `contest` runs them."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contest import Program
from benchmarks.workload import NUM_LAST, Work, remembered

# Beside the token drawn, how many of the likeliest the engine tells of.
TOLD = 20


def make(checkpoint: Path, work: Work) -> Program:
    """A `contest.Maker`.

    The output is the logits of the last positions; of decoding, the likeliest tokens with their
    log-probabilities; of gradients, the loss and their norm.
    """
    import jax
    import jax.numpy as jnp

    from glm5_jax.load import load_model
    from glm5_jax.mesh import single_device
    from glm5_jax.sharding import DECODE, Partition

    partition = Partition(single_device(), DECODE)
    model = load_model(checkpoint, jnp.dtype(work.dtype), partition)
    with jax.set_mesh(partition.mesh):
        if work.kind == "gradient":
            return _gradient(model, work, partition)
        if work.kind == "prefill":
            return _prefill(model, work, partition)
        return _decode(model, work, partition)


def _prefill(model: Any, work: Work, partition: Any) -> Program:
    import jax
    import jax.numpy as jnp

    from glm5_jax.cache import KVCache
    from glm5_jax.collectives import BATCH, MESH_AXES, MODEL, published, spread
    from glm5_jax.mesh import put
    from glm5_jax.model import Glm5, for_decoding, forward, logits
    from glm5_jax.sharding import ROWS

    config, tokens_BT = model.config, put(work.tokens(), partition.mesh, ROWS)
    batch, length = tokens_BT.shape
    model = for_decoding(model)

    def prefill(model: Glm5, tokens_BT: jax.Array) -> tuple[jax.Array, KVCache]:
        cache = KVCache.create(config, batch, length, work.dtype)
        cache = dataclasses.replace(
            cache,
            pools=spread(cache.pools, MESH_AXES),
            length_B=spread(cache.length_B, BATCH),
        )
        places = cache.next_places(jnp.full(batch, length), length)
        output = forward(model, tokens_BT, places, cache)
        assert output.cache is not None
        scores_BPZ = logits(model, output.hidden_BTD[:, -NUM_LAST:])
        return published(scores_BPZ, (MODEL,), 2), output.cache

    specs = (partition.specs(Glm5(config)), ROWS)
    kept = (ROWS, KVCache.specs(config, work.dtype))
    compiled = jax.jit(partition.on_shards(prefill, specs, kept))

    def run() -> Any:
        return jax.block_until_ready(compiled(model, tokens_BT))

    return Program(run, lambda: np.asarray(run()[0]))


def _decode(model: Any, work: Work, partition: Any) -> Program:
    """One step of the engine, whose pages lie in no order."""
    import jax.numpy as jnp

    from glm5_jax.inference.request import Request
    from glm5_jax.inference.steps import (
        Build,
        Turn,
        compiled_steps,
        empty_state,
        page_size_for,
        table_width,
    )
    from glm5_jax.model import for_decoding

    config, batch, context = model.config, work.batch, work.length
    build = Build(config, partition, jnp.dtype(work.dtype), config.vocab_size, num_drafts=0)
    page_size = page_size_for(partition)
    pages = -(-(context + 1) // page_size)
    order_BW = np.random.default_rng(0).permutation(batch * pages).reshape(batch, pages)
    table_BW = np.full((batch, table_width(pages)), batch * pages, np.int32)
    table_BW[:, :pages] = order_BW
    state = empty_state(build, batch, batch * pages, page_size)
    states = [state._replace(pools=_filled(state.pools, config, work, order_BW))]

    request = Request(prompt=(1,), max_new_tokens=1, alternatives=TOLD)
    turn = Turn.of([request] * batch, table_BW, 0)
    ones_B = np.ones(batch, np.int32)
    turn = turn._replace(num_fresh_B=ones_B, length_B=context * ones_B, count_B=ones_B)
    turns = [turn._replace(token_BT=token_B[:, None]) for token_B in work.tokens().T]
    model = for_decoding(model)

    def decoded(turn: Turn) -> np.ndarray:
        state, outcome = compiled_steps(build).advance(model, states.pop(), turn)
        states.append(state)
        told = outcome.likelihoods
        best = np.asarray(told.best_BM)[:, 0], np.asarray(told.best_logprob_BM)[:, 0]
        return np.stack(best, axis=-1)

    return Program(
        lambda: decoded(turns[0]), lambda: np.stack([decoded(turn) for turn in turns], axis=1)
    )


def _filled(pools: Any, config: Any, work: Work, order_BW: np.ndarray) -> Any:
    """With what is remembered of the context in the pages of each row."""
    import jax

    from glm5_jax.layers import layer_places

    shapes = jax.tree.map(lambda stack: np.zeros(stack.shape, stack.dtype), pools)
    for layer, place in enumerate(layer_places(config.segments)):
        slot = shapes.segments[place.segment][place.slot]
        for stack, rows_BSA in zip(slot, remembered(work, layer), strict=True):
            if stack is None:
                continue
            _, _, page, width = stack.shape
            batch, length, _ = rows_BSA.shape
            room = order_BW.shape[1] * page
            rows_BSA = np.pad(rows_BSA, ((0, 0), (0, room - length), (0, 0)))
            paged = rows_BSA.reshape(-1, page, width).astype(work.dtype).view(stack.dtype)
            stack[place.group, order_BW.reshape(-1)] = paged
    return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), shapes, pools)


def _gradient(model: Any, work: Work, partition: Any) -> Program:
    """That of the loss of the next token."""
    import jax
    import jax.numpy as jnp
    import optax
    from jax.sharding import PartitionSpec

    from glm5_jax.collectives import BATCH, total
    from glm5_jax.mesh import put
    from glm5_jax.model import Glm5, forward, logits
    from glm5_jax.places import Places
    from glm5_jax.sharding import ROWS
    from glm5_jax.vocabulary import cross_entropy

    tokens_BT = put(work.tokens(), partition.mesh, ROWS)

    def loss(model: Glm5, tokens_BT: jax.Array) -> jax.Array:
        hidden_BTD = forward(model, tokens_BT, Places.unpadded(*tokens_BT.shape)).hidden_BTD
        scores_BTZ = logits(model, hidden_BTD[:, :-1])
        return total(jnp.mean(cross_entropy(scores_BTZ, tokens_BT[:, 1:])), BATCH)

    def gradient(model: Glm5, tokens_BT: jax.Array) -> tuple[jax.Array, Glm5]:
        return jax.value_and_grad(loss, allow_int=True)(model, tokens_BT)

    specs = partition.specs(Glm5(model.config))
    compiled = jax.jit(partition.on_shards(gradient, (specs, ROWS), (PartitionSpec(), specs)))

    def run() -> tuple[jax.Array, Glm5]:
        return jax.block_until_ready(compiled(model, tokens_BT))

    def output() -> np.ndarray:
        value, gradients = run()
        return np.array([[value], [jax.jit(optax.global_norm)(gradients)]])

    return Program(run, output)
