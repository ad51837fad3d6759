"""Whose row is next: tenants take turns, each for about as many tokens as the others (deficit round robin)."""

from __future__ import annotations

from collections import OrderedDict, deque
from itertools import islice, zip_longest

from overture.serve.engine.row import Row

__all__ = ["FairQueue"]

_QUANTUM = 64
_COUNTED = 64


class FairQueue:
    """Rows that wait for a slot.

    Source: M. Shreedhar and G. Varghese, Efficient fair queuing using deficit round robin (1996).
    """

    def __init__(self) -> None:
        self._rows: OrderedDict[str, deque[Row]] = OrderedDict()
        """By tenant; the first tenant's turn is now."""
        self._credit: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(map(len, self._rows.values()))

    def push(self, row: Row) -> None:
        """Put a row behind its tenant's others."""
        self._of(row).append(row)

    def put_back(self, row: Row) -> None:
        """Put a row that was taken out in front again, and its tenant too."""
        self._of(row).appendleft(row)
        self._credit[row.job.tenant] += _cost(row)
        self._rows.move_to_end(row.job.tenant, last=False)

    def soon(self, count: int) -> list[Row]:
        """Up to so many rows whose turn is about to come: one of every tenant, then another."""
        turns = zip_longest(*self._rows.values())
        return list(islice((row for turn in turns for row in turn if row is not None), count))

    def pop(self) -> Row | None:
        """Take the next row out; None if there is none."""
        while self._rows:
            tenant, rows = next(iter(self._rows.items()))
            if self._credit[tenant] >= _cost(rows[0]):
                row = rows.popleft()
                self._credit[tenant] -= _cost(row)
                self._drop_if_empty(tenant)
                return row
            self._credit[tenant] += _QUANTUM
            self._rows.move_to_end(tenant)
        return None

    def remove(self, row: Row) -> None:
        """Take a row out, wherever it stands."""
        rows = self._rows.get(row.job.tenant)
        if rows is not None and row in rows:
            rows.remove(row)
            self._drop_if_empty(row.job.tenant)

    def _of(self, row: Row) -> deque[Row]:
        self._credit.setdefault(row.job.tenant, 0)
        return self._rows.setdefault(row.job.tenant, deque())

    def _drop_if_empty(self, tenant: str) -> None:
        # Who asks for nothing saves up no credit.
        if not self._rows[tenant]:
            del self._rows[tenant], self._credit[tenant]


def _cost(row: Row) -> int:
    """Tokens that a row will take, as far as one can know: answers are seldom as long as they may be."""
    return len(row.ids) + min(row.most, _COUNTED)
