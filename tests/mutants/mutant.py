"""What a bug is that is put in on purpose."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """One bug: a text of a file, what it becomes, and the tests that should notice."""

    name: str
    file: str
    text: str
    becomes: str
    tests: str
