"""One training row: what the model reads, and what it shall answer.

Each task has an example of its own. Positions in an answer count the row's text tokens alone: wherever virtual tokens
stand, they never carry one.

Shape suffixes: T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from overture.runtime.reading import Reading

__all__ = ["Example", "TextExample"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Example(Reading):
    """One training row. Leading virtual tokens that run ahead are not among its tokens."""

    @property
    def num_targets(self) -> int:
        """How much the row counts in the loss: one answer, or the tokens of one."""
        return 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TextExample(Example):
    """A row of which some tokens are learned, each from those before it."""

    targets: tuple[bool, ...]
    """[T]: True if this token is predicted and counts in the loss. The first never is: no text stands before it."""
    all_text: bool = False
    """True if the row is a text learned as it is, and not an answer to something read before."""

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

    def split(self) -> tuple[Reading, tuple[int, ...]]:
        """What the model reads before the row's answer, and the answer."""
        answer = self.answer
        read = Reading(ids=self.ids[: answer.start], slots=self.slots and self.slots[: answer.start])
        return read, self.ids[answer]

    # Not `super()`: a class with slots is made twice, and its methods know the first one.
    def only(self, positions: Iterable[int]) -> TextExample:
        """The row with the tokens at `positions` alone."""
        kept = tuple(positions)
        return replace(Reading.only(self, kept), targets=tuple(self.targets[i] for i in kept))

    def with_places(self, length: int, at: int, filler: int) -> TextExample:
        """The row with places for `length` virtual tokens before position `at`."""
        targets = (*self.targets[:at], *[False] * length, *self.targets[at:])
        return replace(Reading.with_places(self, length, at, filler), targets=targets)
