"""Whether outputs agree: how far they are from those of transformers in float32.

Of a random model one position says little. Rounding may swap the last token selected, one of 256,
and what that changes is selected from by later layers; bfloat16 swaps experts too. So outputs are
those of several positions; in float32 ours is to be near, in bfloat16 as near as transformers' own.
"""

import numpy as np

# Relative to the largest output of a position, in the mean over positions.
_CLOSE = 2e-2
# Of what transformers is off by in bfloat16, with some room for chance.
_ROOM = 1.5


def likelihoods(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The logarithms of the probabilities [..., M] that logits [..., Z] give to tokens [..., M]."""
    total = np.log(np.sum(np.exp(logits.astype(np.float64)), axis=-1, keepdims=True))
    return np.asarray(np.take_along_axis(logits - total, tokens, axis=-1))


def gaps_by_position(output: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The largest difference at every position relative to its largest output.

    Args:
      output: whose last axis is of one position.
    """
    return np.asarray(np.abs(output - expected).max(axis=-1) / np.abs(expected).max(axis=-1))


def gap(output: np.ndarray, expected: np.ndarray) -> float:
    """`gaps_by_position` in the mean."""
    return float(gaps_by_position(output, expected).mean())


def agrees(dtype: str, ours: float, theirs: float) -> bool:
    """Whether outputs with a gap are what they should be, given the gap of transformers' own."""
    return ours <= (_CLOSE if dtype == "float32" else max(_CLOSE, _ROOM * theirs))
