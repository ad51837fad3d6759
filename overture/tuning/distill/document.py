"""A long text as chunks that fit into the model's context, and the base that sees one of them.

Shape suffixes: T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from overture.errors import ContextLengthError, DataError, UnsupportedModelError
from overture.prompt import SoftPrompt
from overture.runtime.compile import Frozen
from overture.runtime.generate import foreign_id
from overture.runtime.tokens import leading_specials, text_ids
from overture.spec import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Chunk", "chunks_of", "context_of", "require_text_ahead", "seeing", "sight_of"]

_ENDLESS = 2**31


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a text that is read at once."""

    ids: tuple[int, ...]
    """Its tokens, with the special tokens that the tokenizer puts in front of a text."""
    specials: int
    """How many special tokens these are."""

    @property
    def own(self) -> tuple[int, ...]:
        """Its tokens without special ones."""
        return self.ids[self.specials :]


def chunks_of(tokenizer: PreTrainedTokenizerBase, spec: ModelSpec, text: str, most: int) -> list[Chunk]:
    """Cut a text into chunks of about equal length.

    Args:
        tokenizer: the base model's.
        spec: the base model's.
        text: the text.
        most: tokens that a chunk may have, special ones included.

    Raises:
        DataError: an empty text, or ids that the model has no embedding for.
        ContextLengthError: no room for a single token.
    """
    ids, specials = text_ids(tokenizer, text), leading_specials(tokenizer)
    if not text.strip() or not ids:
        raise DataError(expected="a text with at least one token", got="an empty text", do="name another document")
    if max(*ids, 0) >= spec.vocab_size:
        raise foreign_id(max(ids), spec.vocab_size)
    room = most - len(specials)
    if room < 1:
        raise ContextLengthError(
            expected="room for the text beside a question and its answer",
            got=f"{most} tokens",
            do="lower turn_tokens, or choose a model with a longer context",
        )
    count = -(-len(ids) // room)
    edges = [i * len(ids) // count for i in range(count + 1)]
    parts = [ids[a:b] for a, b in pairwise(edges)]
    return [Chunk((*specials, *part), len(specials)) for part in parts]


def context_of(spec: ModelSpec) -> int:
    """Tokens that fit into the model's context with keys that were computed ahead."""
    return min(spec.max_positions or _ENDLESS, spec.rotary_limit or _ENDLESS)


def sight_of(spec: ModelSpec) -> int:
    """Tokens of which every layer sees the first from the last.

    A prefix is seen from everywhere. Behind a text as one, a layer with a sliding window would see what it never sees.
    """
    return min([context_of(spec), *(layer.window for layer in spec.layers if layer.window is not None)])


def require_text_ahead(spec: ModelSpec) -> None:
    """Raise `UnsupportedModelError` unless the keys and values of a text are all that later tokens see of it."""
    spec.require_prefix()
    if not spec.runs_ahead:
        raise UnsupportedModelError(
            expected="a decoder whose positions meet in attention alone, so that a prefix can stand for a text",
            got=f"{spec.base.architecture}, which has more than attention between positions",
            do="distill on another base model",
        )


@torch.no_grad()
def seeing(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> SoftPrompt:
    """The base that sees a text, as a prompt: the text's own keys and values, one virtual token per token."""
    value = Frozen(model, tokenizer).activations(torch.tensor(ids))
    return SoftPrompt(value, ModelSpec.of(model).base, name="text")
