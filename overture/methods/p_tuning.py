"""P-Tuning: virtual tokens anywhere in a template, produced by a prompt encoder (arXiv:2103.10385)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, nn

from overture.errors import ConfigError
from overture.methods.base import FrozenModel, Method, check_choice, check_count, seeded
from overture.methods.init import prompt_length, start_embeddings
from overture.methods.offsets import FreeOffset, LSTMOffset, MLPOffset, Offset, ResidualOffset
from overture.methods.prompt_tuning import TokensModule
from overture.template import Template

__all__ = ["PTuning"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PTuning(Method):
    """Virtual tokens at any place of a template, made to depend on each other by an LSTM and an MLP."""

    name: ClassVar[str] = "p-tuning"

    template: str | None = None
    """Such as `"[V3] {premise} [V3] {hypothesis} [V3]"`; None puts all virtual tokens in front of the text."""
    encoder: str = "lstm"
    """`"lstm"` (the original: bidirectional LSTM and MLP), `"mlp"`, or `"none"` (free virtual tokens)."""
    encoder_hidden: int | None = None
    """Width of the encoder, 2 or more; None for the model's hidden size."""
    residual: bool = True
    """Beside an encoder, every virtual token learns an offset of its own; False for the encoder alone, the original."""
    verbalizer: Mapping[str, str | Sequence[str]] | None = None
    """For masked language models: the word, or words, that say each label at the mask; None if labels are words."""

    def __post_init__(self) -> None:
        Method.__post_init__(self)
        check_choice("encoder", self.encoder, ("lstm", "mlp", "none"))
        if self.encoder_hidden is not None:
            check_count("encoder_hidden", self.encoder_hidden, least=2, do="leave it out for the model's hidden size")
        source: object = self.template
        if not isinstance(source, str | None):
            raise ConfigError(
                expected="a template to be text", got=repr(source), do="write one such as '[V8] {text} [V8]'"
            )
        _check_verbalizer(self.verbalizer)
        template = self.template_
        if template and self.num_virtual_tokens not in (None, template.num_virtual_tokens):
            raise ConfigError(
                expected=f"the {template.num_virtual_tokens} virtual tokens of the template {self.template!r}",
                got=str(self.num_virtual_tokens),
                do="leave num_virtual_tokens out; the template counts them",
            )

    @property
    def template_(self) -> Template | None:
        """The parsed template."""
        return Template.parse(self.template) if self.template else None

    @property
    def words(self) -> Mapping[str, str | Sequence[str]] | None:
        """The verbalizer."""
        return self.verbalizer

    @property
    def learning_rate(self) -> float:
        """Peak step size when a run names none; smaller through an encoder, which multiplies it."""
        return 5e-1 if self.encoder == "none" else 2.5e-3

    def build(self, frozen: FrozenModel, generator: Generator) -> TokensModule:
        """A module whose start is the embeddings asked for, with the encoder's output added."""
        template = self.template_
        asked = template.num_virtual_tokens if template else self.num_virtual_tokens
        start = start_embeddings(self.init, prompt_length(self.init, asked, frozen, usual=20), frozen, generator)
        length, hidden = start.shape
        width = self.encoder_hidden or hidden
        with seeded(generator):
            offset = self._offset(length, hidden, width)
        return TokensModule(start, frozen.spec.embedding_scale, offset)

    def _offset(self, length: int, hidden: int, width: int) -> Offset:
        if self.encoder == "none":
            return FreeOffset(length, hidden)
        encoder = (
            LSTMOffset(length, hidden, width=width)
            if self.encoder == "lstm"
            else MLPOffset(length, hidden, width=hidden, hidden=width, activation=nn.ReLU)
        )
        return ResidualOffset(encoder, length, hidden) if self.residual else encoder


def _check_verbalizer(verbalizer: object) -> None:
    if verbalizer is None:
        return
    listed = [[some] if isinstance(some, str) else some for some in getattr(verbalizer, "values", list)()]
    if (
        not isinstance(verbalizer, Mapping)
        or not listed
        or not all(
            isinstance(some, list | tuple) and some and all(isinstance(w, str) and w for w in some) for some in listed
        )
        or not all(isinstance(label, str) and label for label in verbalizer)
    ):
        raise ConfigError(
            expected="a verbalizer with a word, or a list of words, for every label",
            got=repr(verbalizer),
            do='write one such as {"positive": "great", "negative": ["bad", "awful"]}',
        )
