"""Naming many tensors at once."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

_MOST_NAMED = 3  # of tensors with one fault whose names differ only in numbers


def by_family(faults: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str, list[str]]]:
    """Puts tensors of one fault together if many have it whose names differ only in numbers.

    Yields:
      How to call the tensors, their fault, and their names.
    """
    families: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, fault in faults:
        families[re.sub(r"\d+", "*", name), fault].append(name)
    for (pattern, fault), names in families.items():
        if len(names) <= _MOST_NAMED:
            yield from ((printable(name), fault, [name]) for name in names)
        else:
            example = printable(names[0])
            yield f"{printable(pattern)} ({len(names)} tensors, such as {example})", fault, names


def printable(name: str) -> str:
    """A name from a file, which may hold what moves a terminal's cursor."""
    return name if name.isprintable() else repr(name)
