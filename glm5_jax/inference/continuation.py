"""One continuation as text: cut at stop strings, with the log-probabilities of what is shown."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from glm5_jax.inference.request import Event, Likelihood, Work
from glm5_jax.inference.text import TextStream


class Scored(NamedTuple):
    """A token that is shown."""

    token: int
    likelihood: Likelihood
    offset: int  # of its text, in characters of the continuation


class Part(NamedTuple):
    """What is clear about a continuation with one token more."""

    text: str
    scored: list[Scored]  # tokens where likelihoods were asked for
    finish_reason: str | None


class Continuation:
    """Makes text of tokens as they come."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str]):
        """Prepares for the first token; the text ends before any of the stop strings."""
        self.count = 0  # of tokens, those not shown too
        self.work: Work | None = None  # known where the engine came to the end
        self._decode = decode
        self._text = TextStream(decode, stop)
        self._uncut = TextStream(decode)  # tells where the text of a token begins
        self._shown = self._length = 0  # characters of the two
        self._held: deque[Scored] = deque()

    def push(self, event: Event) -> Part:
        """Takes the next token; there is no more to come once a finish reason is returned."""
        self.count += 1
        self.work = event.work
        text, reason = "", event.finish_reason
        if reason != "stop":  # else it is a token that means the end
            if event.likelihood is not None:
                self._held.append(Scored(event.token, event.likelihood, self._locate(event.token)))
            text = self._text.push(event.token)
        if reason is not None:
            text += self._text.finish()
        if self._text.stopped:
            reason = "stop"
        self._shown += len(text)
        scored = []
        while self._held and self._held[0].offset < self._shown:
            scored.append(self._held.popleft())
        return Part(text, scored, reason)

    def _locate(self, token: int) -> int:
        """Where the text of the next token begins; of parts of a character where that does."""
        begin = self._length
        new, own = self._uncut.push(token), self._decode([token])
        self._length += len(new)
        return self._length - len(own) if own and new.endswith(own) else begin
