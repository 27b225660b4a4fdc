"""The functions that a step spends its time in, each with the work that it cannot do without."""

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glm5_jax.attention import Attention, Queries
from glm5_jax.bits import as_bits
from glm5_jax.cache import Rows
from glm5_jax.config import Config
from glm5_jax.experts import ExpertList, Experts, weighted_experts
from glm5_jax.indexer import Indexer
from glm5_jax.linear import project_f32
from glm5_jax.params import initialize
from glm5_jax.places import Places
from glm5_jax.presets import load_preset
from glm5_jax.quantized import Quantized
from glm5_jax.rope import rotation
from glm5_jax.selection import Selection

_ROUNDS, _LAP_SECONDS = 9, 0.1
_PAGE = 64
_LARGE = 2048  # rows and columns of a matrix whose product is a ceiling
_STREAMED = 2**26  # float32 values, which no cache holds
_DECODE = (8, 1, 16384)  # rows, queries of each, tokens that they see
_PREFILL = (1, 512, 8192)
_EXPERT_TOKENS = (8, 2048)


class Primitive(NamedTuple):
    """A compiled call. Every call is on another layer's data, as those of a model are."""

    name: str
    dtype: str
    call: Callable[[int], Any]  # of the number of the layer
    flops: float  # of the products asked for
    bytes: float  # of operands read and results written, once each
    kind: str = "primitive"


def primitives(config: Config) -> Iterator[Primitive]:
    """All that is measured, ceilings first."""
    yield from ceilings()
    for dtype in ("float32", "bfloat16"):
        for shape in (_DECODE, _PREFILL):
            yield attention(config, dtype, *shape)
        for shape in (_DECODE, _PREFILL):
            yield indexer(config, dtype, *shape)
        for num_tokens in _EXPERT_TOKENS:
            yield experts(config, dtype, num_tokens)
    for kind in ("float8_e4m3fn", "int8"):
        for num_tokens in _EXPERT_TOKENS:
            yield experts(config, "float32", num_tokens, kind)


def ceilings() -> Iterator[Primitive]:
    """What this machine does at best: a large product, and passes over memory."""
    for dtype in ("float32", "bfloat16"):
        matrix = _random((_LARGE, _LARGE), dtype)
        product = jax.jit(functools.partial(project_f32, "MD,FD->MF"))
        call = functools.partial(_same, product, matrix, matrix)
        yield Primitive("large product", dtype, call, 2.0 * _LARGE**3, 0.0, "ceiling")
    values = jnp.ones(_STREAMED, jnp.float32)
    read = functools.partial(_same, jax.jit(jnp.sum), values)
    yield Primitive("reading", "float32", read, 0.0, 4.0 * _STREAMED, "ceiling")
    held = [values + 1]
    add = jax.jit(lambda values: values + 1, donate_argnums=0)  # in place: no page is new

    def write(_: int) -> jax.Array:
        held.append(add(held.pop()))
        return held[0]

    yield Primitive("reading and writing", "float32", write, 0.0, 8.0 * _STREAMED, "ceiling")


def attention(config: Config, dtype: str, batch: int, length: int, context: int) -> Primitive:
    """Absorbed attention to gathered rows, with the products that absorb and that come after."""
    mla, topk, layers = config.mla, config.indexer.topk, config.num_layers
    weights = _weights(Attention(config), dtype)
    stack_LYUA, page_BW = _pages(layers, batch, context, mla.row_dim, dtype)
    queries = Queries(
        _random((batch, length, mla.num_heads, mla.nope_dim), dtype),
        _random((batch, length, mla.num_heads, mla.rope_dim), dtype),
    )
    rng = np.random.default_rng(0)
    index = np.stack(
        [rng.choice(context, topk, replace=False) for _ in range(layers * batch * length)]
    ).reshape(layers, batch, length, topk)
    index_LBTK = jnp.asarray(index, jnp.int32)
    asks, sees = _places(batch, length, context)

    @jax.jit
    def attend(
        weights: Attention, stack_LYUA: jax.Array, index_LBTK: jax.Array, layer: jax.Array
    ) -> jax.Array:
        rows = Rows(stack_LYUA, layer, jnp.dtype(dtype), page_BW=page_BW)
        index_BTK = index_LBTK[layer]
        selection = Selection(index_BTK, jnp.ones_like(index_BTK, bool))
        return weights.attend(queries, rows, asks, sees, selection)[0]

    up = mla.num_heads * mla.kv_rank * (mla.nope_dim + mla.value_dim)
    out = mla.num_heads * mla.value_dim * config.dim
    core = mla.num_heads * topk * (mla.row_dim + mla.kv_rank)
    num_queries, each = batch * length, jnp.dtype(dtype).itemsize
    # Queries of one row may well gather the same rows of the cache, which are read once at least.
    rows_read = batch * min(length * topk, context) * mla.row_dim
    moved = (
        up
        + out
        + rows_read
        + num_queries * (mla.num_heads * (mla.nope_dim + mla.rope_dim) + config.dim)
    )
    return Primitive(
        f"attention to {topk} of {context:,} tokens, {batch} x {length} queries",
        dtype,
        lambda number: attend(weights, stack_LYUA, index_LBTK, jnp.int32(number % layers)),
        2.0 * num_queries * (up + out + core),
        float(moved * each),
    )


def indexer(config: Config, dtype: str, batch: int, length: int, context: int) -> Primitive:
    """Index scores of all visible tokens, and the highest of them."""
    sizes, q_rank, layers = config.indexer, config.mla.q_rank, config.num_layers
    weights = _weights(Indexer(config), dtype)
    stack_LYUJ, page_BW = _pages(layers, batch, context, sizes.head_dim, dtype)
    x_BTD = _random((batch, length, config.dim), dtype)
    latent_BTQ = _random((batch, length, q_rank), dtype)
    asks, sees = _places(batch, length, context)
    turn = rotation(asks.position_BT, config.mla.rope_dim, config.rope_theta)

    @jax.jit
    def select(weights: Indexer, stack_LYUJ: jax.Array, layer: jax.Array) -> Selection:
        keys = Rows(stack_LYUJ, layer, jnp.dtype(dtype), page_BW=page_BW)
        return weights.select(x_BTD, latent_BTQ, keys, turn, asks, sees)

    num_queries, each = batch * length, jnp.dtype(dtype).itemsize
    projections = sizes.num_heads * (sizes.head_dim * q_rank + config.dim)
    scores = sizes.num_heads * (sizes.head_dim + 1) * (context - (length - 1) / 2)
    moved = batch * context * sizes.head_dim + projections + num_queries * (config.dim + q_rank)
    return Primitive(
        f"indexer: {sizes.topk} of {context:,} tokens, {batch} x {length} queries",
        dtype,
        lambda number: select(weights, stack_LYUJ, jnp.int32(number % layers)),
        2.0 * num_queries * (projections + scores),
        float(moved * each + 5 * num_queries * sizes.topk),  # an int32 and a bool of each
    )


def experts(config: Config, dtype: str, num_tokens: int, kind: str | None = None) -> Primitive:
    """The chosen experts of tokens that choose at random; of weights in 8 bits if so told."""
    moe, layers = config.moe, sum(each.mlp == "moe" for each in config.layers)
    one_layer = _weights(Experts(config), dtype)
    if kind is not None:
        one_layer = jax.tree.map(functools.partial(_in_8_bits, kind=kind), one_layer)
    bits = jax.tree.map(as_bits, one_layer)
    stack: Any = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * layers), bits)
    rng = np.random.default_rng(0)
    scores = rng.random((num_tokens, moe.num_experts))
    expert_TK = np.argsort(scores, axis=1)[:, : moe.experts_per_token].astype(np.int32)
    gate_TK = jnp.ones(expert_TK.shape, jnp.float32)
    x_TD = _random((num_tokens, config.dim), dtype)
    mean_load = expert_TK.size // moe.num_experts

    @jax.jit
    def apply(stack: Experts, layer: jax.Array) -> jax.Array:
        held = ExpertList(stack, layer * moe.num_experts, taught=None)
        return weighted_experts(
            held, x_TD, jnp.asarray(expert_TK), gate_TK, moe.num_experts, mean_load
        )[0]

    size = sum(leaf.nbytes for leaf in jax.tree.leaves(one_layer)) / moe.num_experts
    read = len(np.unique(expert_TK)) * size
    stored = f" in {kind}" if kind else ""
    return Primitive(
        f"{moe.experts_per_token} of {moe.num_experts} experts{stored}, {num_tokens:,} tokens",
        dtype,
        lambda number: apply(stack, jnp.int32(number % layers)),
        2.0 * expert_TK.size * 3 * config.dim * moe.ffn,
        read + 2 * x_TD.nbytes,
    )


def measure(preset: str = "bench") -> list[dict[str, Any]]:
    """Median seconds of every primitive, and the share of this machine's roofline that it gets."""
    measured = list(primitives(load_preset(preset).config))
    laps = [_laps(each.call) for each in measured]
    seconds: list[list[float]] = [[] for _ in measured]
    for _ in range(_ROUNDS):
        for number, each in enumerate(measured):
            began = time.perf_counter()
            for lap in range(laps[number]):
                jax.block_until_ready(each.call(lap))
            seconds[number].append((time.perf_counter() - began) / laps[number])
    rows = [
        {**each._asdict(), "seconds": statistics.median(found), "laps": laps[number]}
        for number, (each, found) in enumerate(zip(measured, seconds, strict=True))
    ]
    for row in rows:
        del row["call"]
    return with_shares(rows)


def with_shares(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each primitive with what bounds it, and the share of that bound that it gets.

    The bound is the longer of its FLOPs at the rate of a large product of its dtype, and its bytes
    at the rate of the fastest pass over memory.
    """
    tops = [row for row in rows if row["kind"] == "ceiling"]
    flops = {row["dtype"]: row["flops"] / row["seconds"] for row in tops if row["flops"]}
    bandwidth = max(row["bytes"] / row["seconds"] for row in tops if row["bytes"])

    def complete(row: dict[str, Any]) -> dict[str, Any]:
        if row["kind"] == "ceiling":
            return row
        least = {
            "FLOPs": row["flops"] / flops[row["dtype"]],
            "memory": row["bytes"] / bandwidth,
        }
        bound = max(least, key=lambda name: least[name])
        return {**row, "bound": bound, "share": least[bound] / row["seconds"]}

    return [complete(row) for row in rows]


def _laps(call: Callable[[int], Any]) -> int:
    """How many calls fill a lap, once it is compiled."""
    jax.block_until_ready(call(0))
    began = time.perf_counter()
    jax.block_until_ready(call(1))
    return max(1, int(_LAP_SECONDS / (time.perf_counter() - began)))


def _same(function: Callable[..., Any], *operands: Any) -> Any:
    """A call of what has no layers: the number comes last, and is not needed."""
    return function(*operands[:-1])


def _random(shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape, jnp.dtype(dtype))


def _weights(blueprint: Any, dtype: str) -> Any:
    return initialize(blueprint, jax.random.key(0), std=0.02, dtype=dtype)


def _pages(
    layers: int, batch: int, context: int, width: int, dtype: str
) -> tuple[jax.Array, jax.Array]:
    """A cache filled at random, as bits, and which of its pages each row has."""
    num_pages = batch * context // _PAGE
    stack = as_bits(_random((layers, num_pages, _PAGE, width), dtype))
    page_BW = np.random.default_rng(0).permutation(num_pages).reshape(batch, -1)
    return stack, jnp.asarray(page_BW, jnp.int32)


def _places(batch: int, length: int, context: int) -> tuple[Places, Places]:
    """Of the last tokens of each row, and of all."""
    seen = Places.unpadded(batch, context)
    return jax.tree.map(lambda leaf_BT: leaf_BT[:, -length:], seen), seen


def _in_8_bits(weight_EXY: jax.Array, kind: str) -> Quantized:
    """Rounded, with a scale for each block of 128 x 128 in float8, for each row in int8."""
    experts, rows, columns = weight_EXY.shape
    parts = (rows // 128, columns // 128) if kind.startswith("float8") else (rows, 1)
    scales = jnp.full((experts, *parts), 1e-3, jnp.float32)
    values = jnp.clip(weight_EXY / 1e-3, -127, 127).astype(kind)
    return Quantized(as_bits(values) if kind != "int8" else values, scales, kind, "float32")
