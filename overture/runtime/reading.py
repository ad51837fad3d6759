"""What a model reads in one row, and rows as a batch.

Shape suffixes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

__all__ = ["Encoded", "Reading", "batch_rows"]

R = TypeVar("R", bound="Reading")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a model reads in one row: T tokens. Virtual tokens that run ahead of the text are not among them."""

    ids: tuple[int, ...]
    """Token ids [T]."""
    slots: tuple[int, ...] | None = None
    """[T]: -1 for text, else the index of the virtual token standing there; None if no virtual token stands inside."""
    types: tuple[int, ...] | None = None
    """[T]: which of two texts a token is of, for models that are told so (`token_type_ids`)."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def text(self) -> tuple[int, ...]:
        """The positions of text: those without a virtual token."""
        return tuple(i for i in range(len(self)) if self.slots is None or self.slots[i] < 0)

    def only(self: R, positions: Iterable[int]) -> R:
        """The row with the tokens at `positions` alone."""
        kept = tuple(positions)
        return replace(
            self,
            ids=_at(self.ids, kept),
            slots=self.slots and _at(self.slots, kept),
            types=self.types and _at(self.types, kept),
        )

    def with_places(self: R, length: int, at: int, filler: int) -> R:
        """The row with places for `length` virtual tokens before position `at`."""

        def opened(row: tuple[int, ...], new: Iterable[int]) -> tuple[int, ...]:
            return (*row[:at], *new, *row[at:])

        return replace(
            self,
            ids=opened(self.ids, [filler] * length),
            slots=opened(self.slots or (-1,) * len(self), range(length)),
            types=self.types and opened(self.types, [0] * length),
        )

    def without_places(self: R) -> R:
        """The row without places for virtual tokens, as the frozen model reads it."""
        return self if self.slots is None else replace(self.only(self.text), slots=None)


def _at(row: Sequence[int], positions: Iterable[int]) -> tuple[int, ...]:
    return tuple(row[i] for i in positions)


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A batch of inputs."""

    input_ids: Int[Tensor, "B T"]
    """Token ids; padding and the places of virtual tokens hold ids that are never read."""
    attention_mask: Int[Tensor, "B T"]
    """1 for text and for virtual tokens inside it, 0 for padding."""
    slots: Int[Tensor, "B T"] | None
    """-1 for text and padding, else the index of the virtual token that stands there; None if no row has any."""
    token_type_ids: Int[Tensor, "B T"] | None = None
    """Which of two texts a token is of; None if the model is not told."""

    def to(self, device: torch.device | str) -> Encoded:
        """The same batch on another device."""
        slots, types = (None if t is None else t.to(device) for t in (self.slots, self.token_type_ids))
        return Encoded(self.input_ids.to(device), self.attention_mask.to(device), slots, types)

    def rows(self, numbers: Sequence[int]) -> Encoded:
        """Some rows, in any order and as often as named."""
        chosen = list(numbers)
        slots, types = (None if t is None else t[chosen] for t in (self.slots, self.token_type_ids))
        return Encoded(self.input_ids[chosen], self.attention_mask[chosen], slots, types)

    def inputs(self) -> dict[str, Tensor]:
        """The keywords of a forward pass."""
        types = {} if self.token_type_ids is None else {"token_type_ids": self.token_type_ids}
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask} | types


def batch_rows(rows: Sequence[Reading], filler: int, side: str) -> Encoded:
    """Rows as one batch, filled up with `filler` on `side`."""
    width = max(len(row) for row in rows)

    def filled(columns: Sequence[tuple[int, ...] | None], empty: int) -> Tensor:
        full = torch.full((len(rows), width), empty, dtype=torch.long)
        for number, column in enumerate(columns):
            if column is not None:
                start = width - len(column) if side == "left" else 0
                full[number, start : start + len(column)] = torch.tensor(column)
        return full

    slots, types = [row.slots for row in rows], [row.types for row in rows]
    return Encoded(
        filled([row.ids for row in rows], filler),
        filled([(1,) * len(row) for row in rows], 0),
        None if all(slot is None for slot in slots) else filled(slots, -1),
        None if all(kind is None for kind in types) else filled(types, 0),
    )
