"""Keys and values of the rows: shelves of slots, one for every size, so that a long row costs short ones nothing.

A row stands in a slot of the smallest shelf that holds it, its prompt's prefix in front of its text, and moves up when
it has outgrown the shelf. The first slots of a shelf are taken, the rest are free: what attention reads is a view. Rows
that share a long prefix stand on a shelf of their own, which has the prefix once and only their texts in its slots.

Shape suffixes: R slots, S positions of a slot, K key/value heads, D key size, E value size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from jaxtyping import Float
from torch import Tensor

from overture.prompt import KVPrefix, VirtualTokens

__all__ = ["LayerShape", "Line", "Place", "Shelf", "Shelves"]

_NUMBERS = count()
_SMALLEST = 64
_FEWEST = 4


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one attention layer keeps of a position."""

    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes(self) -> int:
        """Bytes of a position."""
        return self.kv_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


@dataclass(slots=True, eq=False)
class Place:
    """Where a row's keys and values stand."""

    shelf: Shelf
    slot: int


@dataclass(eq=False, slots=True, kw_only=True)
class Line:
    """What the model reads of one row, and how far it has read."""

    ids: list[int] = field(default_factory=list)
    """Token ids, with places of virtual tokens that stand inside the text."""
    slots: tuple[int, ...] = ()
    """From the beginning: -1 for text, else the index of the virtual token that stands there."""
    virtual: VirtualTokens | None = None
    """Virtual tokens inside the text, on the model's device."""
    prefix: KVPrefix | None = None
    """What stands in front of the text, as the model's layers keep it."""
    ahead: int = 0
    """Its positions, P."""
    held: int = 0
    """How many of them are in the slot: none where rows share the prefix, else all."""
    cached: int = 0
    """Positions in the slot."""
    place: Place | None = None

    def stand_behind(self, prefix: KVPrefix | None, *, shared: bool) -> None:
        """Take a prefix, into the slot or beside it."""
        self.prefix, self.ahead = prefix, 0 if prefix is None else prefix.length
        self.held = 0 if shared else self.ahead

    @property
    def beside(self) -> KVPrefix | None:
        """The prefix that the row shares."""
        return None if self.held == self.ahead else self.prefix

    @property
    def length(self) -> int:
        """Positions that the row takes in a slot with all there is to read."""
        return self.held + len(self.ids)

    @property
    def unread(self) -> int:
        """Tokens that are not in the slot."""
        return len(self.ids) if self.place is None else self.held + len(self.ids) - self.cached


class Shelf:
    """Slots of one size.

    Args:
        layers: what the model keeps of a position.
        size: positions of a slot.
        prefix: what all rows of the shelf have in front of their slots.
    """

    def __init__(self, layers: Sequence[LayerShape], size: int, prefix: KVPrefix | None = None) -> None:
        self.number = next(_NUMBERS)
        self.size, self.prefix = size, prefix
        self.rows: list[Line] = []
        self.capacity = 0
        self.keys = [_empty(layer, 0, size, layer.key_dim) for layer in layers]
        self.values = [_empty(layer, 0, size, layer.value_dim) for layer in layers]

    def resize(self, capacity: int) -> None:
        """Have so many slots, not fewer than rows. One layer after the other, so that little is held twice."""
        taken = len(self.rows)
        for tensors in (self.keys, self.values):
            for i, old in enumerate(tensors):
                # What is never written is masked, but read: it must be numbers.
                new = old.new_zeros(capacity, *old.shape[1:])
                new[:taken] = old[:taken]
                tensors[i] = new
        self.capacity = capacity

    def add(self, row: Line) -> None:
        """Put a row into the first free slot, with what it has in its slot elsewhere; else with its prefix."""
        slot, before = len(self.rows), row.place
        self.rows.append(row)
        row.place = Place(self, slot)
        if before is not None:
            for tensors, others in ((self.keys, before.shelf.keys), (self.values, before.shelf.values)):
                for tensor, other in zip(tensors, others, strict=True):
                    tensor[slot, :, : row.cached] = other[before.slot, :, : row.cached]
            before.shelf._free(before.slot)
            return
        row.cached = row.held
        if row.prefix is not None and row.held:
            for tensors, parts in ((self.keys, row.prefix.keys), (self.values, row.prefix.values)):
                for tensor, part in zip(tensors, parts, strict=True):
                    tensor[slot, :, : row.held] = part

    def taken(self, row: Line) -> KVPrefix:
        """A copy of what a row has in its slot."""
        assert row.place is not None
        at = row.place.slot, slice(None), slice(row.cached)
        return KVPrefix(tuple(key[at].clone() for key in self.keys), tuple(value[at].clone() for value in self.values))

    def remove(self, row: Line) -> None:
        """Free a row's slot."""
        assert row.place is not None
        self._free(row.place.slot)
        row.place = None

    def _free(self, slot: int) -> None:
        """The last row takes the slot. What is free is zeros: an infinity left there would reach others through masks,
        even of a row whose own answer was made of numbers.
        """
        last = self.rows.pop()
        end = len(self.rows)
        for tensor in (*self.keys, *self.values):
            if slot != end:
                tensor[slot] = tensor[end]
            tensor[end] = 0
        if slot != end:
            assert last.place is not None
            self.rows[slot] = last
            last.place.slot = slot


class Shelves:
    """All shelves, within a budget of bytes.

    Args:
        layers: what the model keeps of a position.
        budget: most bytes for all slots, taken or free.
        longest: positions that no row exceeds, or None.
    """

    def __init__(self, layers: Sequence[LayerShape], budget: int, longest: int | None) -> None:
        self.layers, self.budget = layers, budget
        self.per_position = sum(layer.bytes for layer in layers)
        self.shelves: dict[tuple[int, KVPrefix | None], Shelf] = {}
        self.singles: list[Shelf] = []
        # A row that moves up stands in two slots for a moment.
        fits = budget // (2 * self.per_position)
        self.longest = min(longest or fits, fits)

    @property
    def bytes(self) -> int:
        """Bytes of all slots."""
        every = (*self.shelves.values(), *self.singles)
        return self.per_position * sum(shelf.capacity * shelf.size for shelf in every)

    def shelf(self, row: Line) -> Shelf | None:
        """The shelf for a row with all it has to read, with a free slot; None if there is no room."""
        key = self._size(row), row.beside
        shelf = self.shelves.get(key) or Shelf(self.layers, *key)
        taken = len(shelf.rows)
        if taken == shelf.capacity:
            wanted = (max(2 * taken, _FEWEST), taken + 1)
            capacity = next((slots for slots in wanted if self._room((slots - taken) * shelf.size)), None)
            if capacity is None:
                return None
            shelf.resize(capacity)
        self.shelves[key] = shelf
        return shelf

    def single(self, row: Line) -> Shelf | None:
        """A shelf with one slot, for a row whose text is read piece by piece; None if there is no room."""
        shelf = Shelf(self.layers, self._size(row), row.beside)
        if not self._room(shelf.size):
            return None
        shelf.resize(1)
        self.singles.append(shelf)
        return shelf

    def leave(self, row: Line) -> None:
        """Free a row's slot."""
        if row.place is not None:
            row.place.shelf.remove(row)
        self.tidy()

    def tidy(self) -> None:
        """Let go of shelves for single rows, and for shared prefixes, that are empty."""
        if self.singles:
            self.singles = [shelf for shelf in self.singles if shelf.rows]
        for key in [key for key, shelf in self.shelves.items() if key[1] is not None and not shelf.rows]:
            del self.shelves[key]

    def _size(self, row: Line) -> int:
        size = _SMALLEST
        while size < row.length:
            size *= 2
        return min(size, max(self.longest, row.length))

    def _room(self, positions: int) -> bool:
        """Whether there is room for so many positions more, if need be without the free slots of other shelves."""
        wanted = self.per_position * positions
        if self.bytes + wanted <= self.budget:
            return True
        for shelf in self.shelves.values():
            if self.bytes + wanted > self.budget and shelf.capacity > len(shelf.rows):
                shelf.resize(len(shelf.rows))
        return self.bytes + wanted <= self.budget


def _empty(layer: LayerShape, capacity: int, size: int, dim: int) -> Float[Tensor, "R K S D"]:
    return torch.zeros(capacity, layer.kv_heads, size, dim, dtype=layer.dtype, device=layer.device)
