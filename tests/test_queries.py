"""Blocks of queries."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from glm5_jax.queries import joined, split


@hypothesis.given(st.integers(1, 300), st.integers(1, 310))
def test_blocks_hold_all_queries_and_hardly_more(num_queries, length):
    x = jnp.arange(2 * num_queries).reshape(2, num_queries)
    blocks = split(x, length)
    num_blocks, batch, block = blocks.shape
    fewest = -(-num_queries // length)
    assert batch == 2 and block <= length and fewest <= num_blocks <= fewest * 4 / 3
    assert num_blocks * block - num_queries < num_blocks
    np.testing.assert_array_equal(joined(blocks, num_queries), x)


@pytest.mark.parametrize(
    ("num_queries", "length", "expected"),
    [(512, 186, (4, 128)), (2048, 46, (45, 46)), (512, 512, (1, 512)), (7, 6, (2, 4))],
)
def test_a_few_more_blocks_are_taken_where_they_need_no_padding(num_queries, length, expected):
    blocks = split(jnp.zeros((1, num_queries)), length)
    assert (blocks.shape[0], blocks.shape[2]) == expected
