"""Whether outputs agree: how far they are from those of transformers in float32.

Of a random model one position says little. Rounding may swap the last token selected, one of 256,
and what that changes is selected from by later layers; bfloat16 swaps experts too. So outputs are
those of several positions. In bfloat16 ours is to be as near as transformers' own. In float32 it is
to be near, or, as rounding alone may come to more in long prompts, as near to transformers in
float64 as transformers in float32 is.
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.contest import Failed
from benchmarks.workload import Work

# Relative to the largest output of a position, in the mean over positions.
_CLOSE = 2e-2
# Of what transformers is off by in the same dtype, with some room for chance.
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


def agrees(ours: float, theirs: float = 0.0) -> bool:
    """Whether outputs with a gap are what they should be.

    Args:
      theirs: the gap of transformers' own in the same dtype, where what both are compared with is
        of a higher precision.
    """
    return ours <= max(_CLOSE, _ROOM * theirs)


def gaps(
    work: Work, ours: np.ndarray, theirs: np.ndarray, expected: np.ndarray
) -> tuple[float, float]:
    """How far off our outputs are, and transformers'.

    Of decoding the engine tells of some tokens only, those that it finds the likeliest, which may
    let ours look worse than it is.
    """
    if work.kind == "decode":
        tokens_BM, ours = ours[..., 0].astype(int), ours[..., 1]
        theirs, expected = likelihoods(theirs, tokens_BM), likelihoods(expected, tokens_BM)
    return gap(ours, expected), gap(theirs, expected)


def judged(
    work: Work, ours: np.ndarray, theirs: np.ndarray, expected: Callable[[str], np.ndarray]
) -> dict[str, Any]:
    """How far off outputs are, and whether ours agree with what they should be.

    Args:
      expected: transformers' in a dtype, of equal scores the first selected.
    """
    theirs_in_order = expected("float32")
    our_gap, their_gap = gaps(work, ours, theirs, theirs_in_order)
    found = {"gap": our_gap, "gap_of_theirs": their_gap}
    if work.dtype != "float32":
        return found | {"agrees": agrees(our_gap, their_gap)}
    if agrees(our_gap):
        return found | {"agrees": True}
    # Whose rounding it is only more precise numbers tell; they take long, and twice the memory.
    try:
        exact = expected("float64")
    except Failed as failure:
        print(f"error: transformers in float64: {failure}", file=sys.stderr)
        return found | {"agrees": False}
    from_exact = gaps(work, ours, theirs_in_order, exact)
    return found | {"gaps_from_float64": from_exact, "agrees": agrees(*from_exact)}
