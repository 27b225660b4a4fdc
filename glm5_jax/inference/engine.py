"""Continuous batching: requests join and leave a running batch between its steps."""

from collections import Counter

import numpy as np

from glm5_jax.collectives import BATCH
from glm5_jax.console import progress
from glm5_jax.errors import InputError
from glm5_jax.inference.request import (
    Event,
    Likelihood,
    Request,
    Statistics,
    Work,
    check_request,
)
from glm5_jax.inference.row import Row
from glm5_jax.inference.schedule import Schedule
from glm5_jax.inference.steps import (
    Build,
    Outcome,
    Portion,
    Turn,
    compiled_steps,
    empty_state,
    page_size_for,
    table_width,
)
from glm5_jax.model import Glm5, for_decoding
from glm5_jax.sharding import Partition, on_one_device

# Tokens of a prompt that are read at once: as few lengths as need be, for each is compiled.
PORTIONS = (32, 128, 512)
_USUAL_LENGTH = 4096  # tokens that there is room for in every slot, unless told


class Engine:
    """Continues requests, as many at a time as there are slots.

    What it does depends on nothing but the calls: several processes that make the same calls, in
    the same order, take the same steps.
    """

    def __init__(
        self,
        model: Glm5,
        partition: Partition | None = None,
        *,
        slots: int = 8,
        context: int | None = None,
        num_tokens: int | None = None,
        cache_tokens: int | None = None,
        draft_tokens: int = 0,
    ):
        """Prepares a model, and memory for what it is to remember.

        Args:
          partition: how the model lies on a mesh; on the first device unless given.
          slots: requests that are continued at a time, rounded up for the mesh.
          context: the most tokens of a prompt and its continuation together; what there is room
            for unless given, and no more than that and than the model was made for.
          num_tokens: ids from here on are not generated; the vocabulary's size unless given.
          cache_tokens: that there is room for in all, rounded up to whole pages; unless given for
            4096 in every slot, and at least for the context where that is given.
          draft_tokens: that the MTP layer drafts at a time; none unless given. The text depends on
            it by rounding only, as several tokens are read at once then; its speed does.

        Raises:
          InputError: there is no MTP layer to draft with, or no room for the context.
        """
        config = model.config
        if draft_tokens and not config.num_mtp_layers:
            raise InputError(
                f"draft tokens are {draft_tokens}, but the model has no MTP layer: expected 0"
            )
        partition = partition or on_one_device()
        num_shards = partition.num_shards(BATCH)
        self.config = config
        self.slots = -(-slots // num_shards) * num_shards
        self._drafts = draft_tokens
        page_size = page_size_for(partition)
        most = min(context or config.max_positions, config.max_positions)
        if cache_tokens is None:
            usual = self.slots * min(most, _USUAL_LENGTH)
            cache_tokens = usual if context is None else max(usual, num_shards * most)
        pages_per_shard = -(-cache_tokens // (num_shards * page_size))
        self.context = min(most, pages_per_shard * page_size)
        if context is not None and self.context < most:
            raise InputError(
                f"cache tokens are {cache_tokens}, {pages_per_shard * page_size} for a text, "
                f"expected at least the context of {most}"
            )
        self._schedule = Schedule(
            self.slots, num_shards, pages_per_shard, page_size, drafts=draft_tokens > 0
        )
        self._model = partition.place(model, Glm5(config))
        if partition.platform == "cpu":
            self._model = for_decoding(self._model)
        build = Build(
            config,
            partition,
            model.embedding.dtype,
            num_tokens or config.vocab_size,
            draft_tokens,
        )
        self._state = empty_state(build, self.slots, num_shards * pages_per_shard, page_size)
        self._steps = compiled_steps(build)
        self._compiled_before = len(self._steps.compiled)
        self._last_number = 0
        self._counts: Counter[str] = Counter()

    def warm_up(self, num_tokens: int) -> None:
        """Compiles the steps that texts of up to so many tokens need, before they are waited for.

        Shows a progress bar.
        """
        shards, size = len(self._schedule.pools), self._schedule.page_size
        pages = -(-min(num_tokens, self.context) // size)
        widths = sorted({table_width(each) for each in range(1, pages + 1)})
        zeros_Z = np.zeros(self.config.vocab_size, np.int32)
        seen = zeros_Z.astype(np.float32), zeros_Z.astype(bool), zeros_Z
        self._state = self._steps.begin(self._state, self._nowhere(), *seen)
        with progress("compile", len(widths) * (len(PORTIONS) + 1)) as advance:
            for width in widths:
                for length in PORTIONS:
                    page_RW = self._pages_of({}, shards, width)
                    portion = Portion.empty(length, page_RW, self._nowhere())
                    self._state = self._steps.read(self._model, self._state, portion)
                    advance(1)
                page_BW = self._pages_of({}, self.slots, width)
                turn = Turn.of([None] * self.slots, page_BW, self._drafts)
                self._state, _ = self._steps.advance(self._model, self._state, turn)
                advance(1)

    @property
    def is_idle(self) -> bool:
        """Whether no request waits or runs."""
        return not self._schedule.waiting and not self._schedule.running

    def submit(self, request: Request) -> int:
        """Lets a request wait for a slot; returns the number that its events will have.

        Raises:
          InputError: it cannot be continued.
        """
        check_request(request, self.config.vocab_size, self.context, "the prompt")
        self._last_number += 1
        tokens = list(request.prompt)
        row = Row(self._last_number, request, self._schedule.page_size, tokens)
        self._schedule.waiting.append(row)
        return row.number

    def cancel(self, number: int) -> Work | None:
        """Gives up a request, if it has not finished; returns what it took."""
        row = self._schedule.give_up(number)
        self._counts["finished"] += row is not None
        return None if row is None else row.work

    def step(self) -> list[Event]:
        """One round: waiting requests join, a portion of prompts is read, all others move on.

        Returns:
          The new tokens, those of each request in order.
        """
        for place, row in self._schedule.admit():
            self._begin(place, row)
        if reading := self._schedule.next_to_read():
            self._read(reading)
        if moving := self._schedule.make_room(self._drafts):
            return self._advance(moving)
        return []

    def statistics(self) -> Statistics:
        """What was done since the start, and is held now."""
        pools, counts = self._schedule.pools, self._counts
        return Statistics(
            slots=self.slots,
            running=len(self._schedule.running),
            waiting=len(self._schedule.waiting),
            finished=counts["finished"],
            prompt_tokens=counts["prompt_tokens"],
            generated_tokens=counts["generated_tokens"],
            work=Work(*(counts[name] for name in Work._fields)),
            pages=sum(pool.num_pages for pool in pools),
            pages_held=sum(pool.num_pages - pool.num_available for pool in pools),
            pages_kept=sum(pool.num_kept for pool in pools),
            compilations=len(self._steps.compiled) - self._compiled_before,
        )

    def _begin(self, place: int, row: Row) -> None:
        row_of_shard = self._nowhere()
        row_of_shard[self._schedule.shard(place)] = place % self._schedule.rows_per_shard
        seen = row.seen(self.config.vocab_size)
        self._state = self._steps.begin(self._state, row_of_shard, *seen)

    def _count_prompt(self, row: Row) -> None:
        """Before a row is first read or moved on."""
        if not row.was_read:
            row.was_read = True
            reused = row.num_found * row.page_size
            row.work = row.work._replace(reused_tokens=reused)
            self._counts["reused_tokens"] += reused
            self._counts["prompt_tokens"] += len(row.request.prompt)

    def _read(self, reading: dict[int, int]) -> None:
        """Reads the next tokens of the rows at the given places, one of each shard."""
        running = self._schedule.running
        rows = {shard: running[place] for shard, place in reading.items()}
        counts = {shard: min(row.unread, PORTIONS[-1]) for shard, row in rows.items()}
        length = min(size for size in PORTIONS if size >= max(counts.values()))
        portion = Portion.empty(
            length, self._pages_of(rows, len(self._schedule.pools)), self._nowhere()
        )
        for shard, row in rows.items():
            self._count_prompt(row)
            start, count = row.length, counts[shard]
            portion.token_RT[shard, :count] = row.tokens[start : start + count]
            portion.count_R[shard] = count
            portion.start_R[shard] = start
            portion.writable_R[shard] = row.writable
            portion.row_R[shard] = reading[shard] % self._schedule.rows_per_shard
        self._state = self._steps.read(self._model, self._state, portion)
        for shard, place in reading.items():
            rows[shard].length += counts[shard]
            self._schedule.settle(place)

    def _advance(self, moving: dict[int, Row]) -> list[Event]:
        """Moves rows on, by one token or several."""
        requests = [
            moving[place].request if place in moving else None for place in range(self.slots)
        ]
        turn = Turn.of(requests, self._pages_of(moving, self.slots), self._drafts)
        for place, row in moving.items():
            self._count_prompt(row)
            fresh = row.tokens[-max(1, row.num_fresh) :]
            turn.token_BT[place, : len(fresh)] = fresh
            turn.num_fresh_B[place] = row.num_fresh
            turn.length_B[place] = row.length
            turn.count_B[place] = row.num_generated + 1
        self._state, outcome = self._steps.advance(self._model, self._state, turn)
        return self._take_in(moving, outcome, turn.wants_likelihood_B)

    def _take_in(
        self, moving: dict[int, Row], outcome: Outcome, wants_likelihood_B: np.ndarray
    ) -> list[Event]:
        token_BT, num_B = np.asarray(outcome.token_BT), np.asarray(outcome.num_B)
        found = (
            [np.asarray(each) for each in outcome.likelihoods] if any(wants_likelihood_B) else []
        )
        events = []
        for place, row in moving.items():
            known, before = row.num_generated, row.work
            reason = row.move_on(token_BT[place, : num_B[place]].tolist(), self._drafts)
            new = row.tokens[len(row.request.prompt) + known :]
            for ahead, token in enumerate(new):
                likelihood = None
                if wants_likelihood_B[place]:
                    likelihood = _likelihood(row.request, *(each[place, ahead] for each in found))
                events.append(Event(row.number, token, likelihood, None, None))
            for name, now, was in zip(Work._fields, row.work, before, strict=True):
                self._counts[name] += now - was
            self._counts["generated_tokens"] += len(new)
            if reason is None:
                self._schedule.settle(place)
            else:
                events[-1] = events[-1]._replace(finish_reason=reason, work=row.work)
                self._counts["finished"] += 1
                self._schedule.leave(place)
        return events

    def _nowhere(self) -> np.ndarray:
        """For each shard, the number of a row that it does not have."""
        shards = len(self._schedule.pools)
        return np.full(shards, self._schedule.rows_per_shard, np.int32)

    def _pages_of(self, rows: dict[int, Row], size: int, width: int = 0) -> np.ndarray:
        """A table of rows' pages; where there is none, one outside the pool.

        Args:
          rows: by their line in the table.
          size: how many lines it has.
          width: the least, which is rounded up.
        """
        width = table_width(max([width, *(len(row.pages) for row in rows.values())]))
        page_BW = np.full((size, width), self._schedule.pools[0].num_pages, np.int32)
        for line, row in rows.items():
            page_BW[line, : len(row.pages)] = row.pages
        return page_BW


def _likelihood(
    request: Request, logprob: np.ndarray, best_M: np.ndarray, best_logprob_M: np.ndarray
) -> Likelihood:
    pairs = zip(best_M.tolist(), best_logprob_M.tolist(), strict=True)
    return Likelihood(float(logprob), tuple(pairs)[: request.alternatives])
