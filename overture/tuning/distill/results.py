"""What a distillation returns."""

from __future__ import annotations

from dataclasses import dataclass

from overture.prompt import SoftPrompt
from overture.tuning.results import TuneResult

__all__ = ["DistillResult"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillResult:
    """A text as a prompt, and how near the base behind it is to the base that sees the text."""

    run: TuneResult
    """The tuning. Its losses are divergences from the base that sees the text (nats per answer token), for which they
    would be 0; `frozen_loss` is that of the base without the text."""
    document_tokens: int
    """Tokens of the text."""
    chunks: int
    """Chunks in which it was studied."""
    prompt_bytes: int
    """Bytes of the prompt's keys and values in the model's own number format."""
    document_bytes: int
    """Bytes of the text's keys and values in the same format: what a cache takes that holds the whole text."""

    @property
    def prompt(self) -> SoftPrompt:
        """The prompt."""
        return self.run.prompt

    @property
    def loss(self) -> float:
        """Mean divergence of the base behind the prompt from the base that sees the text, nats per answer token."""
        return self.run.loss

    @property
    def frozen_loss(self) -> float:
        """The same of the base without the text."""
        return self.run.frozen_loss
