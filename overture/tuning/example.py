"""One training row as the model sees it: token ids, which of them count, and where virtual tokens stand between them.

Shape suffixes: T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from overture.runtime.encode import with_places

__all__ = ["Example"]


@dataclass(frozen=True, slots=True)
class Example:
    """One training row as the model sees it. T tokens; leading virtual tokens are not among them."""

    ids: tuple[int, ...]
    """Token ids [T]."""
    targets: tuple[bool, ...]
    """[T]: True if this token is predicted and counts in the loss. The first never is: no text stands before it."""
    slots: tuple[int, ...] | None
    """[T]: -1 for text, else the index of the virtual token standing there; None if no virtual token stands inside."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_targets(self) -> int:
        """Tokens that count in the loss."""
        return sum(self.targets)

    @property
    def answer(self) -> slice:
        """Where the row's last run of targets stands."""
        end = max(i for i, target in enumerate(self.targets) if target) + 1
        start = max(i for i in range(end) if not self.targets[i]) + 1
        return slice(start, end)

    def split(self) -> tuple[tuple[list[int], list[int] | None], list[int]]:
        """What the model reads (ids and slots) before the row's answer, and the answer."""
        answer = self.answer
        slots = None if self.slots is None else list(self.slots[: answer.start])
        return (list(self.ids[: answer.start]), slots), list(self.ids[answer])

    def only(self, positions: Iterable[int]) -> Example:
        """The row with the tokens at `positions` alone."""
        kept = tuple(positions)
        slots = None if self.slots is None else tuple(self.slots[i] for i in kept)
        return Example(tuple(self.ids[i] for i in kept), tuple(self.targets[i] for i in kept), slots)

    def with_leading(self, length: int, filler: int) -> Example:
        """The row with places for `length` virtual tokens in front, for models that cannot run them ahead."""
        ids, slots = with_places(self.ids, length, filler)
        return Example(tuple(ids), (*[False] * length, *self.targets), tuple(slots))

    def without_slots(self) -> Example:
        """The row without places for virtual tokens, as the frozen model reads it."""
        if self.slots is None:
            return self
        text = self.only(i for i, slot in enumerate(self.slots) if slot < 0)
        return Example(text.ids, text.targets, None)
