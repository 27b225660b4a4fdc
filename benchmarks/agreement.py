"""Whether outputs agree: how far they are from those of transformers in float32.

Of a random model a last position says little. Rounding may swap the last token selected, one of
256, and what that changes is selected from by later layers; bfloat16 swaps experts too. So outputs
are those of many positions, and no further off than transformers' own in the same dtype.
"""

import numpy as np

# Relative to the largest output of a position, in the mean. Where transformers is further off
# itself, so may ours be, with room for chance.
_CLOSE, _ROOM = 2e-2, 2.0


def likelihoods(logits_BZ: np.ndarray, tokens_BM: np.ndarray) -> np.ndarray:
    """The logarithm of the probability BM that logits give to tokens."""
    total_B1 = np.log(np.sum(np.exp(logits_BZ.astype(np.float64)), axis=-1, keepdims=True))
    return np.asarray(np.take_along_axis(logits_BZ - total_B1, tokens_BM, axis=-1))


def gap(output: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference at a position relative to its largest output, in the mean.

    Args:
      output: whose last axis is of one position.
    """
    most = np.abs(output - expected).max(axis=-1) / np.abs(expected).max(axis=-1)
    return float(most.mean())


def agrees(ours: float, theirs: float) -> bool:
    """Whether outputs with a gap are as good as those of transformers with another."""
    return ours <= max(_CLOSE, _ROOM * theirs)
