"""Ragged prompts of one batch: which row carries which prefix, of which length.

Shape suffixes: B rows, U distinct prompts, P longest prefix, K key/value heads, D head size, T text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from overture.prompt import KVPrefix

__all__ = ["PrefixRows", "repeats"]


@dataclass(frozen=True, slots=True, eq=False)
class PrefixRows:
    """Distinct prefixes stacked once, and each row's choice among them."""

    keys: tuple[Float[Tensor, "U _K P _D"], ...]
    """Per layer; shorter prefixes are filled up with zeros that no row sees."""
    values: tuple[Float[Tensor, "U _K P _E"], ...]
    """Per layer."""
    choice: Int[Tensor, " B"]
    """Index of each row's prefix; that of an empty one for a row without."""
    lengths: Int[Tensor, " B"]
    """Length of each row's prefix; 0 for a row without one."""
    uniform: bool
    """True if every row has a prefix of the same length, so that nothing needs masking."""

    @classmethod
    def stack(cls, rows: Sequence[KVPrefix | None], device: torch.device) -> PrefixRows | None:
        """Stack the prefixes of a batch, each distinct object once; None if no row has one."""
        distinct = list({id(row): row for row in rows if row is not None}.values())
        if not distinct:
            return None
        place = {id(prefix): i for i, prefix in enumerate(distinct)}
        nothing = len(distinct)
        if any(row is None for row in rows):
            # A prefix of its own: whatever stands in another row's prefix, NaN too, must not reach a row without one.
            distinct.append(distinct[0].map(lambda t: t[:, :0]))
        lengths = [0 if row is None else row.length for row in rows]
        return cls(
            keys=tuple(map(_stack, zip(*(prefix.keys for prefix in distinct), strict=True))),
            values=tuple(map(_stack, zip(*(prefix.values for prefix in distinct), strict=True))),
            choice=torch.tensor([nothing if row is None else place[id(row)] for row in rows], device=device),
            lengths=torch.tensor(lengths, device=device),
            uniform=len(set(lengths)) == 1,
        )

    @property
    def longest(self) -> int:
        """P, the longest prefix."""
        return self.keys[0].shape[2]

    def repeated(self, times: int) -> PrefixRows:
        """Each row `times` times in a row, as beams and `num_return_sequences` repeat them."""
        if times == 1:
            return self
        return PrefixRows(
            self.keys,
            self.values,
            self.choice.repeat_interleave(times),
            self.lengths.repeat_interleave(times),
            self.uniform,
        )

    def visible(self) -> Bool[Tensor, "B P"]:
        """True where a row's prefix has a position."""
        return torch.arange(self.longest, device=self.lengths.device) < self.lengths[:, None]


def _stack(layer: Sequence[Float[Tensor, "K _P D"]]) -> Float[Tensor, "U K P D"]:
    longest = max(tensor.shape[1] for tensor in layer)
    filled = [pad(t, (0, 0, 0, longest - t.shape[1])) if t.shape[1] < longest else t for t in layer]
    return torch.stack(filled)


def repeats(batch: int, rows: int) -> int | None:
    """How often each of `rows` rows stands in a batch of `batch`, or None if it cannot be."""
    return batch // rows if rows and batch % rows == 0 else None
