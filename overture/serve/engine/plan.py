"""What one step does: which rows write, which texts are read and how far, within the engine's memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from overture.prompt import KVPrefix
from overture.serve.engine.attention import Group
from overture.serve.engine.cache import Shelves
from overture.serve.engine.config import EngineConfig
from overture.serve.engine.failure import as_failure
from overture.serve.engine.row import Row
from overture.serve.engine.schedule import FairQueue

__all__ = ["Part", "Planner", "grouped"]

Part = tuple[Row, int]
"""A row, and how many tokens it reads in this step."""


class Planner:
    """Keeps the rows in their slots.

    Args:
        shelves: where the slots are.
        config: the engine's limits.
        ready: the prefix of a row's prompts.
    """

    def __init__(self, shelves: Shelves, config: EngineConfig, ready: Callable[[Row], KVPrefix | None]) -> None:
        self.shelves, self.config, self._ready = shelves, config, ready
        self.queue = FairQueue()
        self.rows: list[Row] = []
        """In slots, in the order in which they were admitted."""
        self.preemptions = 0

    def parts(self) -> list[Part]:
        """The next step's rows, with a slot for all that they read."""
        for row in [row for row in self.rows if row.unread == 1]:
            if row.place is not None:
                self._fit(row)
        writing = [(row, 1) for row in self.rows if row.unread == 1]
        return writing + self._reading()

    def leave(self, row: Row) -> None:
        """Take a row out of its slot, or out of the queue."""
        if row in self.rows:
            self.rows.remove(row)
            self.shelves.leave(row)
        else:
            self.queue.remove(row)

    def _fit(self, row: Row) -> None:
        """A slot that is large enough for the row, if need be that of a younger one."""
        while row.place is not None:
            shelf = row.place.shelf
            if row.length <= shelf.size and shelf not in self.shelves.singles:
                return
            larger = self.shelves.shelf(row)
            if larger is not None:
                larger.add(row)
                self.shelves.tidy()
                return
            if row.length <= shelf.size:
                return  # it may stay alone
            self._put_back(self.rows[-1])

    def _put_back(self, row: Row) -> None:
        self.leave(row)
        self.queue.put_back(row)
        self.preemptions += 1

    def _reading(self) -> list[Part]:
        """Texts, in the order of admission, as far as the step's share of tokens goes."""
        parts: list[Part] = []
        left = self.config.prefill_chunk
        for row in [row for row in self.rows if row.unread > 1]:
            # Those who wait have a half between them, so that nobody waits for the end of a long text.
            count = min(row.unread, max(1, left // 2) if len(self.queue) else left)
            if count:
                parts.append((row, count))
                left -= count
        while left and len(self.rows) < self.config.max_rows:
            next = self.queue.pop()
            if next is None:
                break
            count = self._admitted(next, left, first=not parts)
            if count:
                parts.append((next, count))
                left -= count
            elif not next.ended:
                self.queue.put_back(next)
                break
        return parts

    def _admitted(self, row: Row, left: int, *, first: bool) -> int:
        """Give a row a slot; the tokens it reads in this step, 0 if it has to wait."""
        whole = row.unread <= left
        if not whole and not first and left < self.config.prefill_chunk // 4:
            return 0  # too little to begin with
        try:
            prefix = self._ready(row)
            row.stand_behind(prefix, shared=prefix is not None and self._shares(prefix))
            shelf = self.shelves.shelf(row) if whole else self.shelves.single(row)
            if shelf is None:
                return 0
            count = min(row.unread, left)
            shelf.add(row)
        except Exception as error:  # whatever it is, such as no memory for this prompt: it is this row's alone
            self.shelves.leave(row)
            row.end("error", as_failure("a row could not be admitted", error))
            return 0
        self.rows.append(row)
        return count

    def _shares(self, prefix: KVPrefix) -> bool:
        """Whether a row shall read the prefix where it is kept. Attending to it apart pays where it is long."""
        return prefix.length >= self.config.share_from and any(row.prefix is prefix for row in self.rows)


def grouped(parts: Sequence[Part]) -> tuple[list[Part], list[Group]]:
    """The parts in the order of their slots, and neighbours of one shelf that read alike as groups."""

    def place(part: Part) -> tuple[int, bool, int]:
        row, count = part
        assert row.place is not None
        return row.place.shelf.number, count > 1, row.place.slot

    ordered = sorted(parts, key=place)
    groups: list[Group] = []
    for _, run in groupby(enumerate(ordered), key=lambda pair: (*place(pair[1])[:2], place(pair[1])[2] - pair[0])):
        members = [part for _, part in run]
        first = members[0][0].place
        assert first is not None
        groups.append(
            Group(
                first.shelf,
                first.slot,
                [row.cached for row, _ in members],
                [count for _, count in members],
                [row.held for row, _ in members],
            )
        )
    return ordered, groups
