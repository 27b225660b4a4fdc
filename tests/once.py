"""Training runs of one process that share the programs of equal settings."""

import contextlib
import functools
from collections.abc import Iterator

import pytest

import train.evaluation
import train.loop
import train.run

_MAKERS = [
    (train.run, "make_recipe"),
    (train.loop, "make_step"),
    (train.evaluation, "make_evaluate"),
]


@contextlib.contextmanager
def programs_made_once() -> Iterator[None]:
    """Runs trace and compile only what none before has: most of the time that a short one takes.

    A real run is a process of its own, which `test_kills` and `resuming` have.
    """
    with pytest.MonkeyPatch.context() as patch:
        for module, name in _MAKERS:
            patch.setattr(module, name, functools.cache(getattr(module, name)))
        yield
