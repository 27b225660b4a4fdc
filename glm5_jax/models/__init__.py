"""Trained models that come along, in the published layout, each with a card."""

from pathlib import Path

_FOLDER = Path(__file__).parent

SHIPPED = tuple(sorted(path.parent.name for path in _FOLDER.glob("*/config.json")))


def shipped(name: str) -> Path:
    """The folder of one of them."""
    return _FOLDER / name
