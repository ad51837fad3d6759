"""Rows with more tokens than fit: what is cut, and what must stay."""

from __future__ import annotations

from typing import TYPE_CHECKING

from overture.errors import DataError
from overture.runtime.tokens import leading_specials
from overture.tuning.example import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["head", "tail", "too_long"]


def too_long(example: Example, max_tokens: int) -> DataError:
    """The error for a row that may not be cut."""
    return DataError(
        expected=f"at most {max_tokens} tokens",
        got=f"{len(example)} tokens, {example.num_targets} of them to learn",
        do="shorten the row, raise max_length, or pass --truncate",
    )


def head(example: Example, max_tokens: int) -> Example:
    """Drop tokens from the right."""
    return example.only(range(max_tokens))


def tail(example: Example, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Example:
    """Drop text from the left, but not the special tokens in front, virtual tokens, or the answer.

    Raises:
        DataError: what must stay is too long.
    """
    answer = example.answer.start
    slots = example.slots or (-1,) * len(example)
    free = [i for i in range(_specials_in_front(example, tokenizer), answer) if slots[i] == -1]
    # Something must stand before the answer, or its first token could not be predicted.
    spare = len(free) if len(free) < answer else len(free) - 1
    excess = len(example) - max_tokens
    if excess > spare:
        error = too_long(example, max_tokens)
        got = f"{error.got}, and too few others to cut"
        raise DataError(expected=error.expected, got=got, do="shorten the answer or raise max_length")
    dropped = set(free[:excess])
    return example.only(i for i in range(len(example)) if i not in dropped)


def _specials_in_front(example: Example, tokenizer: PreTrainedTokenizerBase) -> int:
    specials = tuple(leading_specials(tokenizer))
    if specials and example.ids[: len(specials)] == specials:
        return len(specials)
    # A chat template may write a bos of its own.
    return int(example.ids[0] == tokenizer.bos_token_id)
