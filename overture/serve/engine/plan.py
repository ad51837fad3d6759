"""What one step does: which rows write, which texts are read and how far, within the engine's memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from overture.errors import OvertureError
from overture.prompt import KVPrefix
from overture.serve.engine.attention import Group
from overture.serve.engine.cache import Line, Shelves
from overture.serve.engine.config import EngineConfig
from overture.serve.engine.failure import as_failure
from overture.serve.engine.front import Compilation
from overture.serve.engine.prefixes import Prefixes
from overture.serve.engine.row import Row
from overture.serve.engine.schedule import FairQueue

__all__ = ["Part", "Planner", "grouped"]

Part = tuple[Row | Compilation, int]
"""A line, and how many tokens it reads in this step."""


class Planner:
    """Keeps the rows in their slots.

    Args:
        shelves: where the slots are.
        config: the engine's limits.
        prefixes: what stands in front of rows.
    """

    def __init__(self, shelves: Shelves, config: EngineConfig, prefixes: Prefixes) -> None:
        self.shelves, self.config, self._prefixes = shelves, config, prefixes
        self.queue = FairQueue()
        self.rows: list[Row] = []
        """In slots, in the order in which they were admitted."""
        self.compiling: list[Compilation] = []
        """Cold prompts in slots."""
        self.preemptions = 0

    def parts(self) -> list[Part]:
        """The next step's rows, with a slot for all that they read."""
        for row in [row for row in self.rows if row.unread == 1]:
            if row.place is not None:
                self._fit(row)
        writing: list[Part] = [(row, 1) for row in self.rows if row.unread == 1]
        return writing + self._reading()

    def leave(self, row: Row) -> None:
        """Take a row out of its slot, or out of the queue."""
        if row in self.rows:
            self.rows.remove(row)
            self.shelves.leave(row)
        else:
            self.queue.remove(row)

    def compiled(self, line: Compilation) -> None:
        """Take a cold prompt that has been read out of its slot, for the rows that wait for it."""
        self._prefixes.finish(line)
        self.compiling.remove(line)
        self.shelves.leave(line)

    def give_up(self, line: Compilation, error: OvertureError) -> None:
        """Take out a cold prompt that cannot be read; the rows that wait for it end when it is their turn."""
        line.error = error
        self.compiling.remove(line)
        self.shelves.leave(line)

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
            if self.compiling:
                # Nobody has been answered behind it yet; it begins anew when there is room.
                self.shelves.leave(self.compiling.pop())
            else:
                self._put_back(self.rows[-1])

    def _put_back(self, row: Row) -> None:
        self.leave(row)
        self.queue.put_back(row)
        self.preemptions += 1

    def _reading(self) -> list[Part]:
        """Texts and cold prompts, in the order of admission, as far as the step's share of tokens goes."""
        parts: list[Part] = []
        left = self.config.prefill_chunk
        lines: list[Row | Compilation] = [*self.compiling, *(row for row in self.rows if row.unread > 1)]
        for line in lines:
            # Those who wait have a half between them, so that nobody waits for the end of a long text.
            count = min(line.unread, max(1, left // 2) if len(self.queue) else left)
            if count:
                parts.append((line, count))
                left -= count
        return parts + self._admitted(left, first=not parts)

    def _admitted(self, left: int, *, first: bool) -> list[Part]:
        """Rows for the free slots, in turn. One whose prompt is cold waits for that, and holds up no other; one for
        which there is no memory holds up all others, or their shorter rows would take what it waits for.
        """
        parts: list[Part] = []
        late: list[Row] = []
        while left and len(self.rows) + len(late) < self.config.max_rows:
            row = self.queue.pop()
            if row is None:
                break
            cold = self._cold(row)
            started = self._started(cold, left) if cold else self._seated(row, left, first=first and not parts)
            parts += started
            left -= sum(count for _, count in started)
            if row.place is None and not row.ended:
                late.append(row)
                if not cold or any(line.place is None and not line.over for line in cold):
                    break
        else:
            parts += self._ahead(left)
        for row in reversed(late):
            self.queue.put_back(row)
        return parts

    def _ahead(self, left: int) -> list[Part]:
        """Cold prompts of those whose turn is next, so that they find them warm; no more than can be kept so long."""
        parts: list[Part] = []
        room = self.config.prefix_bytes // self.shelves.per_position
        for row in self.queue.soon(self.config.max_rows):
            room -= sum(prompt.length for prompt in row.prompts)
            if room < 0 or not left:
                break
            started = self._started(self._cold(row), left)
            parts += started
            left -= sum(count for _, count in started)
        return parts

    def _cold(self, row: Row) -> list[Compilation]:
        """What has to be read before a row can be."""
        if row.front is None:
            row.front = self._prefixes.front(() if row.virtual is not None else row.prompts)
        return row.front.cold

    def _started(self, cold: Sequence[Compilation], left: int) -> list[Part]:
        """Give slots to cold prompts that have none, as far as there is room."""
        parts: list[Part] = []
        for line in cold:
            if line.place is not None or not left:
                continue
            try:
                count = self._placed(line, left, first=False)
            except Exception as error:
                self.shelves.leave(line)
                line.error = as_failure("a prompt could not be compiled", error)
                continue
            if count:
                self.compiling.append(line)
                parts.append((line, count))
                left -= count
        return parts

    def _seated(self, row: Row, left: int, *, first: bool) -> list[Part]:
        """Give a row a slot, if there is room; nothing of it is cold."""
        assert row.front is not None
        try:
            prefix = self._prefixes.ready(row.front)
            row.stand_behind(prefix, shared=prefix is not None and self._shares(prefix))
            count = self._placed(row, left, first=first)
        except Exception as error:  # whatever it is, such as no memory for this prompt: it is this row's alone
            self.shelves.leave(row)
            row.end("error", as_failure("a row could not be admitted", error))
            return []
        if not count:
            return []
        row.front = None
        self.rows.append(row)
        return [(row, count)]

    def _placed(self, line: Line, left: int, *, first: bool) -> int:
        """Give a line a slot; the tokens it reads in this step, 0 if it has to wait."""
        whole = line.unread <= left
        if not whole and not first and left < self.config.prefill_chunk // 4:
            return 0  # too little to begin with
        shelf = self.shelves.shelf(line) if whole else self.shelves.single(line)
        if shelf is None:
            return 0
        count = min(line.unread, left)
        shelf.add(line)
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
