"""Who is in the batch, and who has which pages: all decisions of the engine, without arrays."""

import collections
from collections.abc import Iterator

from glm5_jax.inference.pages import PagePool
from glm5_jax.inference.row import Row


class Schedule:
    """The rows of a batch, the requests that wait for one, and the pages of the cache.

    Its decisions depend on nothing but what it was told, and in which order.
    """

    def __init__(
        self,
        num_rows: int,
        num_shards: int,
        pages_per_shard: int,
        page_size: int,
        *,
        drafts: bool,
    ):
        self.page_size = page_size
        self.drafts = drafts
        self.waiting: collections.deque[Row] = collections.deque()
        self.rows: list[Row | None] = [None] * num_rows
        self.pools = [PagePool(pages_per_shard) for _ in range(num_shards)]
        self.rows_per_shard = num_rows // num_shards

    @property
    def running(self) -> dict[int, Row]:
        """The rows in use, by their place in the batch; the request that came first first."""
        rows = {place: row for place, row in enumerate(self.rows) if row is not None}
        return dict(sorted(rows.items(), key=lambda item: item[1].number))

    def shard(self, place: int) -> int:
        """The shard of the batch that a place is in."""
        return place // self.rows_per_shard

    def pool(self, place: int) -> PagePool:
        """The pages for the row at a place."""
        return self.pools[self.shard(place)]

    def admit(self) -> Iterator[tuple[int, Row]]:
        """Gives waiting requests free places, in their order, while there is memory for them."""
        while self.waiting:
            row = self.waiting[0]
            names = row.names(len(row.tokens) - 1)
            places = [place for place in self._free_places() if self._has_room(place, row)]
            if not places:
                return
            # Where most of it is known already, or else most memory is left.
            place = max(
                places,
                key=lambda place: (
                    self.pool(place).count_known(names),
                    self.pool(place).num_available,
                    -place,
                ),
            )
            self.rows[place] = self.waiting.popleft()
            self._take_pages(place, row)
            yield place, row

    def _take_pages(self, place: int, row: Row) -> None:
        """Gives a row the pages that are known already, and others for the rest."""
        pool = self.pool(place)
        row.begin(pool.find(row.names(len(row.tokens) - 1)), drafts=self.drafts)
        row.pages += pool.take(row.missing_pages())

    def _free_places(self) -> list[int]:
        return [place for place, row in enumerate(self.rows) if row is None]

    def _has_room(self, place: int, row: Row) -> bool:
        """Whether there are pages for a row, and one for each that runs: it will soon want it."""
        neighbours = sum(self.shard(other) == self.shard(place) for other in self.running)
        return self.pool(place).num_available >= row.missing_pages() + neighbours

    def next_to_read(self) -> dict[int, int]:
        """For each shard with prompts to read, the place of the request that came first."""
        first: dict[int, int] = {}
        for place, row in self.running.items():
            if row.unread and self.shard(place) not in first:
                self._look_again(place, row)
                if row.unread:
                    first[self.shard(place)] = place
        return first

    def _look_again(self, place: int, row: Row) -> None:
        """Before a prompt is read: whether one like it was since, as other choices of one are."""
        names = row.names(len(row.tokens) - 1)
        if not row.was_read and self.pool(place).count_known(names) > row.num_found:
            self.pool(place).release(row.pages)
            self._take_pages(place, row)

    def make_room(self, ahead: int) -> dict[int, Row]:
        """The rows that move on, given the pages for as many tokens as they may need.

        Where memory runs out, the request that came last gives its pages back and waits: it will
        read its prompt and its text so far again, and go on as if nothing had been.
        """
        for place, row in self.running.items():
            while self.rows[place] is row and not row.unread:
                missing, pool = row.missing_pages(ahead), self.pool(place)
                if missing <= pool.num_available:
                    row.pages += pool.take(missing)
                    break
                *_, last = (o for o in self.running if self.shard(o) == self.shard(place))
                waiting = [self.leave(last), *self.waiting]
                self.waiting = collections.deque(sorted(waiting, key=lambda row: row.number))
        return {place: row for place, row in self.running.items() if not row.unread}

    def settle(self, place: int) -> None:
        """Lets the pages of a row that will not change any more be found."""
        row = self.rows[place]
        assert row is not None
        names = row.settled_pages
        for page, name in list(zip(row.pages, names, strict=False))[row.num_found :]:
            self.pool(place).name(page, name)
        row.num_found = max(row.num_found, len(names))

    def leave(self, place: int) -> Row:
        """Takes a row out of the batch; its pages are free to be used."""
        row = self.rows[place]
        assert row is not None
        self.rows[place] = None
        self.pool(place).release(row.pages)
        row.pages = []
        return row

    def give_up(self, number: int) -> Row | None:
        """Takes out a request, wherever it is, and returns it; None if it is not here."""
        for row in self.waiting:
            if row.number == number:
                self.waiting.remove(row)
                return row
        for place, row in self.running.items():
            if row.number == number:
                return self.leave(place)
        return None
