"""The highest scores of many rows, exactly, by passes over them that a CPU's cores share.

XLA's CPU backend (0.10) has a top-k of its own that puts one row after the other on a heap, in one
thread. With many rows it is 1.4 to 6 times as fast to find what score the last one chosen has, by
halving, and then where those are that reach it. Axes: R rows, S scores of a row, L of them side by
side, W words of a row's bits, I bits of a word.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from glm5_jax.collectives import alike
from glm5_jax.queries import map_queries

_BLOCK_BYTES = 2 * 2**20  # of rows that are passed over again and again: what caches hold
_LANES, _MOST_OF_A_BYTE = 256, 127  # columns that are counted side by side, each in a byte
_WORD = 32
# Names the loop in traces: how often it runs depends on the scores; about so often.
HALVING_LOOP, EXPECTED_HALVINGS = "halvings", 23.0


def positions_of_highest(score_RS: jax.Array, most: int) -> jax.Array:
    """Where the `most` highest scores of each row are; of equals the first.

    Returns:
      int32, RK, in order of position. Not differentiable.
    """
    num_columns = score_RS.shape[1]
    padding = ((0, 0), (0, -num_columns % _LANES))
    score_RS = jnp.pad(jax.lax.stop_gradient(score_RS), padding, constant_values=-jnp.inf)
    rows = max(1, _BLOCK_BYTES // (4 * score_RS.shape[1]))

    def of_block(score_1RS: jax.Array) -> jax.Array:
        return _set_bits(_chosen(score_1RS[0], most), most)[None]

    index_RK = map_queries(of_block, rows, score_RS[None])[0]
    return jnp.minimum(index_RK, num_columns - 1)  # a row with NaN has none that are highest


def _chosen(score_RS: jax.Array, most: int) -> jax.Array:
    """Which entries are the `most` highest of their row, of equals the first."""
    num_columns = score_RS.shape[1]
    low_R, high_R = map(_ordered, (jnp.min(score_RS, axis=1), jnp.max(score_RS, axis=1)))
    wanted_R, _ = alike(jnp.full(low_R.shape, most, jnp.int32), low_R)
    bound_R = _largest(low_R, high_R, lambda bound_R1: score_RS >= _float(bound_R1), wanted_R)
    bound_R1 = _float(bound_R)[:, None]
    above_RS, equal_RS = score_RS > bound_R1, score_RS == bound_R1
    wanted_R = wanted_R - _count(above_RS)
    from_end_S = jnp.arange(num_columns - 1, -1, -1, dtype=jnp.int32)

    def first_ones() -> jax.Array:
        start_R, _ = alike(jnp.zeros(low_R.shape, jnp.int32), low_R)
        return _largest(
            start_R,
            start_R + num_columns - 1,
            lambda bound_R1: equal_RS & (from_end_S >= bound_R1),
            wanted_R,
        )

    some_too_many = jnp.any(_count(equal_RS) > wanted_R)
    bound_R = jax.lax.cond(some_too_many, first_ones, lambda: jnp.zeros_like(bound_R))
    return above_RS | (equal_RS & (from_end_S >= bound_R[:, None]))


def _ordered(score: jax.Array) -> jax.Array:
    """Integers in the order of floats, between any two of which there is a middle."""
    return _turned(jax.lax.bitcast_convert_type(score, jnp.int32))


def _float(ordered: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(_turned(ordered), jnp.float32)


def _turned(bits: jax.Array) -> jax.Array:
    """Floats below zero fall with their other bits, integers rise; turned back it is the same."""
    return bits ^ ((bits >> 31) & jnp.int32(2**31 - 1))


def _largest(
    low_R: jax.Array,
    high_R: jax.Array,
    holding: Callable[[jax.Array], jax.Array],
    wanted_R: jax.Array,
) -> jax.Array:
    """The largest bound that as many entries as wanted hold, or one that just as many hold.

    Args:
      low_R: a bound that as many hold; none above `high_R` do.
      holding: from bounds R1 to which entries hold them, RS; the higher the bound, the fewer.
    """

    def halve(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_R, high_R = bounds
        distance_R = jax.lax.bitcast_convert_type(high_R - low_R, jnp.uint32)  # past 2**31 too
        half_R = distance_R // 2 + distance_R % 2
        middle_R = low_R + jax.lax.bitcast_convert_type(half_R, jnp.int32)
        found_R = _count(holding(middle_R[:, None]))
        enough_R = found_R >= wanted_R
        low_R = jnp.where(enough_R, middle_R, low_R)
        high_R = jnp.where(enough_R, high_R, middle_R - 1)
        return low_R, jnp.where(found_R == wanted_R, low_R, high_R)

    with jax.named_scope(HALVING_LOOP):
        return jax.lax.while_loop(
            lambda bounds: jnp.any(bounds[0] < bounds[1]), halve, (low_R, high_R)
        )[0]


def _count(held_RS: jax.Array) -> jax.Array:
    """How many of each row: in bytes side by side, which XLA's CPU backend adds as it compares."""
    at_once = _LANES * _MOST_OF_A_BYTE

    def count(part_RS: jax.Array) -> jax.Array:
        bytes_RL = jnp.sum(part_RS.reshape(len(part_RS), -1, _LANES), axis=1, dtype=jnp.int8)
        return jnp.sum(bytes_RL.astype(jnp.int32), axis=1)

    starts = range(0, held_RS.shape[1], at_once)
    return functools.reduce(jnp.add, (count(held_RS[:, at : at + at_once]) for at in starts))


def _set_bits(chosen_RS: jax.Array, most: int) -> jax.Array:
    """The positions of the first `most` that are chosen, RK: by words of bits, then in a word."""
    bit_RWI = chosen_RS.reshape(len(chosen_RS), -1, _WORD)
    value_I = jnp.uint32(1) << jnp.arange(_WORD, dtype=jnp.uint32)
    word_RW = jnp.sum(jnp.where(bit_RWI, value_I, jnp.uint32(0)), axis=2, dtype=jnp.uint32)
    upto_RW = jnp.cumsum(_ones(word_RW), axis=1)
    rank_K = jnp.arange(most, dtype=jnp.int32)

    def words_before(upto_W: jax.Array) -> jax.Array:
        return jnp.searchsorted(upto_W, rank_K, side="right", method="scan_unrolled")

    place_RK = jax.vmap(words_before)(upto_RW).astype(jnp.int32)
    word_RK = jnp.take_along_axis(word_RW, place_RK, axis=1, mode="clip")
    before_RK = jnp.take_along_axis(upto_RW, place_RK, axis=1, mode="clip") - _ones(word_RK)
    rank_RK, bit_RK = rank_K - before_RK, jnp.zeros_like(place_RK)
    size = _WORD // 2
    while size:  # the half of what is left of the word that has it
        low_RK = (word_RK >> bit_RK.astype(jnp.uint32)) & jnp.uint32(2**size - 1)
        in_high_RK = rank_RK >= _ones(low_RK)
        rank_RK = jnp.where(in_high_RK, rank_RK - _ones(low_RK), rank_RK)
        bit_RK = jnp.where(in_high_RK, bit_RK + size, bit_RK)
        size //= 2
    return place_RK * _WORD + bit_RK


def _ones(word: jax.Array) -> jax.Array:
    return jax.lax.population_count(word).astype(jnp.int32)
