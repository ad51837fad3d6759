"""Prompt Tuning: virtual tokens at the input layer, no network (arXiv:2104.08691)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Generator, Tensor

from overture.methods.base import FrozenModel, Method, PromptModule
from overture.methods.init import prompt_length, start_embeddings
from overture.methods.offsets import FreeOffset, Offset
from overture.prompt import VirtualTokens

__all__ = ["PromptTuning", "TokensModule"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptTuning(Method):
    """P virtual tokens in front of the text, at the input layer only."""

    name: ClassVar[str] = "prompt"

    @property
    def learning_rate(self) -> float:
        """Peak step size when a run names none."""
        return 5e-1

    def build(self, frozen: FrozenModel, generator: Generator) -> TokensModule:
        """A module whose start is the embeddings asked for."""
        length = prompt_length(self.init, self.num_virtual_tokens, frozen, usual=20)
        start = start_embeddings(self.init, length, frozen, generator)
        return TokensModule(start, frozen.spec.embedding_scale, FreeOffset(*start.shape))


class TokensModule(PromptModule):
    """Virtual tokens as `start + scale * offset`."""

    start: Tensor

    def __init__(self, start: Float[Tensor, "P hidden"], scale: float, offset: Offset) -> None:
        super().__init__()
        self.register_buffer("start", start)
        self.scale = scale
        self.offset = offset

    def forward(self, generator: Generator | None = None) -> VirtualTokens:
        """The virtual tokens as they stand."""
        return VirtualTokens(self.start + self.scale * self.offset())
