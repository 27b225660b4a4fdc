"""Which pages of a pool are free, held and kept: the cache's memory, by what is used."""

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np


class PagePool:
    """The pages of one pool. A page that was filled may be found again by the text up to its end.

    Pages that are no longer held are kept, as long as there is room, for prompts that begin alike.
    """

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._unused = list(reversed(range(num_pages)))
        self._holders: Counter[int] = Counter()
        self._kept: OrderedDict[int, None] = OrderedDict()  # the longest unused first
        self._page_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}

    @property
    def num_available(self) -> int:
        """How many pages can be taken."""
        return len(self._unused) + len(self._kept)

    @property
    def num_kept(self) -> int:
        """How many pages nobody holds that may be found again."""
        return len(self._kept)

    def take(self, count: int) -> list[int]:
        """Pages to write to, of which as many must be available."""
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        if self._unused:
            page = self._unused.pop()
        else:
            page, _ = self._kept.popitem(last=False)
            del self._page_of[self._name_of.pop(page)]
        self._holders[page] = 1
        return page

    def find(self, names: Sequence[bytes]) -> list[int]:
        """Holds the pages of these names, up to the first that is not there, and returns them."""
        found = []
        for name in names:
            if name not in self._page_of:
                break
            page = self._page_of[name]
            self._kept.pop(page, None)
            self._holders[page] += 1
            found.append(page)
        return found

    def count_known(self, names: Sequence[bytes]) -> int:
        """How many pages `find` would return."""
        known = [name in self._page_of for name in names]
        return known.index(False) if False in known else len(known)

    def name(self, page: int, name: bytes) -> None:
        """Says that a page is filled, so that it can be found; the first of a name is."""
        if name not in self._page_of and page not in self._name_of:
            self._page_of[name] = page
            self._name_of[page] = name

    def release(self, pages: Sequence[int]) -> None:
        """Gives pages back; the last of a text are the first to be used for something else."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                del self._holders[page]
                if page in self._name_of:
                    self._kept[page] = None
                else:
                    self._unused.append(page)


def page_names(
    tokens: Sequence[int], page_size: int, first: int = 0, before: bytes = b""
) -> Iterator[bytes]:
    """The names of the pages that tokens fill, from page `first` on; `before` it is one's name.

    A name is a digest of all tokens up to the end of the page.
    """
    for start in range(first * page_size, len(tokens) - page_size + 1, page_size):
        filled = np.asarray(tokens[start : start + page_size], np.int32).tobytes()
        before = hashlib.blake2b(before + filled, digest_size=16).digest()
        yield before
