"""Where words and characters of a text stand among its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from overture.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Span", "located", "tokens_of_words"]

Span = tuple[int, int]
"""First character, and one past the last."""


def located(
    tokenizer: PreTrainedTokenizerBase, text: str, pair: str | None = None
) -> tuple[Any, list[int | None], list[Span]]:
    """A text, or two, with special tokens; and for each token of which text it is and which characters it covers.

    Returns:
        What the tokenizer returns, per token 0, 1 or None (special), and per token its characters in its own text.

    Raises:
        UnsupportedModelError: the tokenizer does not tell.
    """
    if not tokenizer.is_fast:
        raise UnsupportedModelError(
            expected="a fast tokenizer, which tells where in the text its tokens stand",
            got=type(tokenizer).__name__,
            do="load it with AutoTokenizer.from_pretrained(..., use_fast=True)",
        )
    encoded: Any = tokenizer(text, pair, return_offsets_mapping=True, verbose=False)
    return encoded, list(encoded.sequence_ids()), [tuple(span) for span in encoded["offset_mapping"]]


def tokens_of_words(words: Sequence[str], spans: Sequence[Span]) -> list[int | None]:
    """The first token of each word, where the words are joined by single spaces; None for a word without tokens.

    Args:
        words: the words.
        spans: the characters of each token; empty for special tokens.
    """
    first: list[int | None] = []
    start = 0
    for word in words:
        end = start + len(word)
        # A token may cover the space in front of its word; its end tells which word it is of.
        first.append(next((i for i, (a, b) in enumerate(spans) if a < b and start < b <= end), None))
        start = end + 1
    return first
