"""A request on its way through the batch."""

import dataclasses

import numpy as np

from glm5_jax.inference.pages import page_names
from glm5_jax.inference.request import Request, Work


@dataclasses.dataclass(eq=False)
class Row:
    """A request, its text so far, and what the cache holds of it."""

    number: int
    request: Request
    page_size: int
    tokens: list[int]  # the prompt and what was generated
    work: Work = Work(0, 0, 0, 0)
    was_read: bool = False  # in part at least; if it waits, then because it gave way
    pages: list[int] = dataclasses.field(default_factory=list)
    length: int = 0  # tokens stored: all but the last, once the prompt was read
    writable: int = 0  # position from which on pages are the row's own
    num_fresh: int = 0  # of the last tokens, how many the MTP layer is to read
    num_found: int = 0  # pages that can be found by their names
    _names: list[bytes] = dataclasses.field(default_factory=list)

    @property
    def unread(self) -> int:
        """Tokens that are to be read before the text goes on."""
        return len(self.tokens) - 1 - self.length

    @property
    def num_generated(self) -> int:
        """Tokens of the text."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def settled_pages(self) -> list[bytes]:
        """The names of the pages that will not change, as those with rows of drafts still do."""
        return self.names(min(self.length, self.length - self.num_fresh + 1))

    def names(self, num_tokens: int) -> list[bytes]:
        """The names of the pages that so many tokens fill."""
        known, wanted = len(self._names), num_tokens // self.page_size
        if known < wanted:
            before = self._names[-1] if known else b""
            end = wanted * self.page_size
            self._names += page_names(self.tokens[:end], self.page_size, known, before)
        return self._names[:wanted]

    def missing_pages(self, ahead: int = 0) -> int:
        """How many more pages are needed for all tokens and so many after them."""
        most = len(self.request.prompt) + self.request.max_new_tokens
        wanted = min(len(self.tokens) + ahead, most)
        return max(0, -(-wanted // self.page_size) - len(self.pages))

    def begin(self, pages: list[int], *, drafts: bool) -> None:
        """Starts reading after what the given pages, of other requests, hold."""
        reused = len(pages) * self.page_size
        self.pages, self.num_found = pages, len(pages)
        self.writable = reused
        # To draft, the last reused token is read again: for its hidden state, and not stored.
        self.length = max(0, reused - 1) if drafts else reused
        self.num_fresh = min(1, len(self.tokens) - 1)

    def seen(self, vocabulary: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What `sampling.Seen` has of this row."""
        prompt = len(self.request.prompt)
        bias_Z = np.zeros(vocabulary, np.float32)
        for token, value in self.request.sampling.logit_bias.items():
            bias_Z[token] = value
        in_prompt_Z = np.zeros(vocabulary, bool)
        in_prompt_Z[self.tokens[:prompt]] = True
        generated_Z = np.bincount(self.tokens[prompt:], minlength=vocabulary).astype(np.int32)
        return bias_Z, in_prompt_Z, generated_Z

    def move_on(self, tokens: list[int], num_drafts: int) -> str | None:
        """Takes in new tokens, up to the one that ends the text; returns why it ends, if it does.

        Args:
          tokens: those that were drafted and accepted, and one more.
        """
        _, steps, drafted, accepted = self.work
        self.work = self.work._replace(
            main_steps=steps + 1,
            drafted_tokens=drafted + num_drafts,
            accepted_tokens=accepted + len(tokens) - 1,
        )
        self.length += len(tokens)
        self.num_fresh = len(tokens)
        for token in tokens:
            self.tokens.append(token)
            if token in self.request.stop:
                return "stop"
            if self.num_generated == self.request.max_new_tokens:
                return "length"
        return None
