"""The embedding seam: virtual tokens written over the rows of reserved positions of the embedded input.

Shape suffixes: B rows, T text, P longest prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from overture.prompt import VirtualTokens

__all__ = ["TokenRows"]


@dataclass(frozen=True, slots=True, eq=False)
class TokenRows:
    """Which virtual token stands at which position of each row."""

    tokens: Sequence[VirtualTokens | None]
    """Per row of `slots`."""
    slots: Int[Tensor, "B T"]
    """-1 for text, else the index of the row's virtual token that stands there."""

    def window(self, start: int, length: int, times: int) -> TokenRows:
        """The part that a forward pass over `length` positions from `start` sees, each row `times` times."""
        slots = self.slots[:, start : start + length]
        slots = pad(slots, (0, length - slots.shape[1]), value=-1)
        tokens = [row for row in self.tokens for _ in range(times)]
        return TokenRows(tokens, slots.repeat_interleave(times, dim=0))

    def write(self, embedded: Float[Tensor, "B T hidden"]) -> Float[Tensor, "B T hidden"]:
        """`embedded` with the virtual tokens in their places, differentiable in both."""
        slots = self.slots.to(embedded.device)
        # Compiled code does not branch on numbers.
        if not torch.compiler.is_compiling() and not (slots >= 0).any():
            return embedded
        # Joined in fp32 at least: under autocast to bf16, torch joins no fp16.
        wide = torch.promote_types(embedded.dtype, torch.float32)
        empty = embedded.new_zeros(0, embedded.shape[-1], dtype=wide)
        rows = [empty if row is None else row.embeddings.to(empty) for row in self.tokens]
        stacked = torch.cat([empty.new_zeros(1, embedded.shape[-1]), *rows]).to(embedded)
        starts = torch.tensor([1, *(len(row) for row in rows[:-1])], device=slots.device).cumsum(0)
        virtual = stacked[torch.where(slots >= 0, slots + starts[:, None], 0)]
        return torch.where((slots >= 0)[..., None], virtual, embedded)
