"""Which prompts share a pass through the model, and how much memory a pass takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Fits", "PassCost", "Size", "grouped"]


class Size(NamedTuple):
    """What a pass has to hold."""

    prompts: int
    """Prompts."""
    rows: int
    """Rows."""
    longest: int
    """Tokens of the longest row, up to which the others are padded."""

    def with_(self, other: Size) -> Size:
        """Both in one pass."""
        return Size(self.prompts + other.prompts, self.rows + other.rows, max(self.longest, other.longest))


Fits = Callable[[Size], bool]
"""Whether there is memory for a pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassCost:
    """Bytes that one forward and backward pass takes for a while, beside what prompts hold all the time."""

    fixed: float
    """Of any pass."""
    prompt: float
    """Of one prompt: its keys and values, and what a network in front of them keeps for the backward pass."""
    token: float
    """Of one token of one row, padding included."""
    longest: int
    """Length of the rows at which it was measured."""

    def bytes(self, size: Size) -> float:
        """Bytes of a pass. Attention may keep the square of a row's length, so longer rows count by theirs."""
        tokens = size.rows * size.longest * max(1.0, size.longest / self.longest)
        return self.fixed + size.prompts * self.prompt + tokens * self.token


def grouped(sizes: Sequence[Size], fits: Fits) -> list[list[int]]:
    """Which entries share a pass: all, if they fit; else as many as do, those of similar length together.

    An entry that does not fit by itself has a pass of its own.
    """
    if not sizes:
        return []
    groups: list[list[int]] = []
    whole = sizes[0]
    for size in sizes[1:]:
        whole = whole.with_(size)
    if fits(whole):
        return [list(range(len(sizes)))]
    current: Size | None = None
    for index in sorted(range(len(sizes)), key=lambda i: (sizes[i].longest, i)):
        joined = None if current is None else current.with_(sizes[index])
        if joined is None or not fits(joined):
            groups.append([index])
            current = sizes[index]
        else:
            groups[-1].append(index)
            current = joined
    return groups
