"""Types of the arguments of `glm5-convert`."""

import argparse
import json
import re

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def portion(text: str) -> float:
    """A share of a whole."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"is {text!r:.80}, expected above 0 and at most 1")
    return value


def share(text: str) -> tuple[int, int]:
    """The number of a process, and of how many."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(f"is {text!r:.80}, expected I/N such as 0/4, I below N")
    return int(match[1]), int(match[2])


def size(text: str) -> int:
    """A size in bytes, in units of 1000 (5GB) or of 1024 (5GiB)."""
    match = re.fullmatch(r"(\d{1,18})\s*(?:([KMGT]?)B?|([KMGT])IB)", text.strip().upper())
    size = 0
    if match:
        size = int(match[1]) * (
            1024 ** (1 + "KMGT".index(match[3])) if match[3] else _UNITS[match[2]]
        )
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size, expected one like 5GB")
    return size


def setting(text: str) -> tuple[str, object]:
    """A key and a value in JSON, where a word needs no quotes."""
    key, equals, value = text.partition("=")
    try:
        return key, json.loads(value)
    except ValueError:
        if key and equals and re.fullmatch(r"[\w.-]+", value):
            return key, value
    raise argparse.ArgumentTypeError(f"is {text!r:.80}, expected KEY=VALUE, VALUE in JSON")
