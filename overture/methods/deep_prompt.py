"""Deep prompts: P vectors joined to every block's input and dropped at its output (arXiv:2110.07602).

They pass through the block's own norm and projections, so the same family as Prefix Tuning, one step earlier.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from overture.methods.base import FrozenModel, Method, PromptModule, check_count, seeded
from overture.methods.init import prompt_length, random_like, reference_tokens, start_tokens
from overture.methods.offsets import FreeOffset, MLPOffset, Offset
from overture.prompt import BlockInputs

__all__ = ["DeepModule", "DeepPrompt"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepPrompt(Method):
    """A soft prompt per block, at the block's input."""

    name: ClassVar[str] = "deep"

    reparameterization: bool = False
    """Train through fully connected layers, which are folded away on save."""
    reparameterization_hidden: int = 512
    """Hidden size of these layers, 1 or more."""

    def __post_init__(self) -> None:
        Method.__post_init__(self)
        check_count("reparameterization_hidden", self.reparameterization_hidden, do="use the default, 512")

    @property
    def learning_rate(self) -> float:
        """Peak step size when a run names none; smaller through the network, which multiplies it."""
        return 2e-3 if self.reparameterization else 2e-1

    def build(self, frozen: FrozenModel, generator: Generator) -> DeepModule:
        """A module whose start is exactly what enters each block for the words given, or noise at that scale."""
        frozen.spec.require_prefix()
        length = prompt_length(self.init, self.num_virtual_tokens, frozen, usual=16)
        reference = frozen.block_inputs(reference_tokens(frozen, generator)).hidden
        tokens = start_tokens(self.init, length, frozen, generator)
        start = (
            torch.stack([random_like(layer, length, generator) for layer in reference])
            if tokens is None
            else frozen.block_inputs(tokens).hidden
        )
        scale = reference.float().square().mean(dim=(1, 2)).sqrt()
        layers, _, hidden = start.shape
        offset: Offset
        with seeded(generator):
            offset = (
                MLPOffset(
                    length, layers * hidden, width=hidden, hidden=self.reparameterization_hidden, activation=nn.Tanh
                )
                if self.reparameterization
                else FreeOffset(length, layers * hidden)
            )
        return DeepModule(start, scale, offset)


class DeepModule(PromptModule):
    """Block inputs as `start + scale * offset`."""

    start: Tensor
    scale: Tensor

    def __init__(self, start: Float[Tensor, "L P hidden"], scale: Float[Tensor, " L"], offset: Offset) -> None:
        super().__init__()
        self.register_buffer("start", start)
        self.register_buffer("scale", scale)
        self.offset = offset

    def forward(self, generator: Generator | None = None) -> BlockInputs:
        """The vectors joined to each block's input."""
        layers, _, hidden = self.start.shape
        offset = self.offset().unflatten(1, (layers, hidden)).transpose(0, 1)
        return BlockInputs(self.start + self.scale[:, None, None] * offset)
