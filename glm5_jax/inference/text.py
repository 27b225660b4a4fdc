"""Tokens to text while they come, up to a stop string."""

from collections.abc import Callable, Sequence

from glm5_jax.errors import InputError

_UNFINISHED = "\ufffd"  # how bytes show that are no character, or not yet
_LONGEST = 16  # tokens that are decoded together, however long no character ends
_OVERLAP = 4  # bytes of the longest character: with so many, where one begins is clear again


def overlap(text: str, strings: Sequence[str]) -> int:
    """How many characters at the end of a text may begin one of the strings, but do not end it."""
    return max(
        (
            size
            for string in strings
            for size in range(1, min(len(string) - 1, len(text)) + 1)
            if text.endswith(string[:size])
        ),
        default=0,
    )


class TextStream:
    """The text of tokens that come one by one, each part of it given out once it is certain.

    All parts together are `decode` of all tokens, cut before the stop string that is complete
    first. Only the latest tokens are decoded for each new one: those since the text was last
    certain, and those that made it so, because some tokenizers drop a space before the first.

    `decode` may change what is not text yet (U+FFFD at the end) when tokens follow, and nothing
    else. Tokenizers that fall back to bytes (not GLM's) do so unless bytes are no text at all.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()):
        """Raises `InputError` if a stop string is empty."""
        if "" in stop:
            raise InputError("stop is '', expected a text of at least one character")
        self._decode = decode
        self._stop = tuple(stop)
        self._window: list[int] = []
        self._known = 0  # tokens at the beginning of the window that were certain before
        self._shown = 0  # characters of its text that were
        self._held = ""  # certain, but may begin a stop string
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string came: there is no more text, and more tokens are of no use."""
        return self._stopped

    def push(self, token: int) -> str:
        """Takes the next token; returns the text that is certain now, which may be empty."""
        # A token that stays empty beside another is one that decoding skips.
        if self._stopped or not self._decode([token, token]):
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        changed = len(text) > self._shown and not text.endswith(_UNFINISHED)
        if not changed and len(self._window) < _LONGEST:
            return ""
        certain = text.removesuffix(_UNFINISHED)
        new = certain[self._shown :]
        unsure = len(text) - len(certain)
        self._window = self._window[-_OVERLAP if unsure else self._known :]
        self._known = len(self._window)
        self._shown = len(self._decode(self._window)) - unsure
        return self._until_stop(new)

    def finish(self) -> str:
        """Returns the text that was held back; call it once, after the last token."""
        text = self._until_stop(self._decode(self._window)[self._shown :])
        rest, self._held = self._held, ""
        return text + rest

    def _until_stop(self, new: str) -> str:
        """What can be given out of the text held back and new text."""
        if self._stopped:
            return ""
        text = self._held + new
        found = [
            (text.find(stop) + len(stop), text.find(stop)) for stop in self._stop if stop in text
        ]
        if found:
            self._stopped = True
            end = min(found)[1]
            self._held = ""
        else:
            end = len(text) - overlap(text, self._stop)
            self._held = text[end:]
        return text[:end]
