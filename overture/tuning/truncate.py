"""Rows with more tokens than fit: what is cut, and what must stay."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from overture.errors import DataError
from overture.runtime.tokens import specials_in_front, trailing_specials
from overture.tuning.example import Example, TextExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["head", "tail", "text_right", "too_long"]


E = TypeVar("E", bound=Example)


def too_long(example: Example, max_tokens: int) -> DataError:
    """The error for a row that may not be cut."""
    learned = f", {example.num_targets} of them to learn" if isinstance(example, TextExample) else ""
    return DataError(
        expected=f"at most {max_tokens} tokens",
        got=f"{len(example)} tokens{learned}",
        do="shorten the row, raise max_length, or pass --truncate",
    )


def head(example: TextExample, max_tokens: int) -> TextExample:
    """Drop tokens from the right."""
    return example.only(range(max_tokens))


def tail(example: TextExample, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> TextExample:
    """Drop text from the left, but not the special tokens in front, virtual tokens, or the answer.

    Raises:
        DataError: what must stay is too long.
    """
    answer = example.answer.start
    slots = example.slots or (-1,) * len(example)
    free = [i for i in range(specials_in_front(tokenizer, example.ids), answer) if slots[i] == -1]
    # Something must stand before the answer, or its first token could not be predicted.
    spare = len(free) if len(free) < answer else len(free) - 1
    excess = len(example) - max_tokens
    if excess > spare:
        error = too_long(example, max_tokens)
        got = f"{error.got}, and too few others to cut"
        raise DataError(expected=error.expected, got=got, do="shorten the answer or raise max_length")
    dropped = set(free[:excess])
    return example.only(i for i in range(len(example)) if i not in dropped)


def text_right(example: E, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> E:
    """Drop text from the right, but not the special tokens around it or virtual tokens.

    Raises:
        DataError: what must stay is too long.
    """
    front, behind = specials_in_front(tokenizer, example.ids), len(trailing_specials(tokenizer))
    free = [i for i in example.text if front <= i < len(example) - behind]
    excess = len(example) - max_tokens
    if excess >= len(free):
        raise too_long(example, max_tokens)
    dropped = set(free[len(free) - excess :])
    return example.only(i for i in range(len(example)) if i not in dropped)
