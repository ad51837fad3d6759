"""What Overture asks of a tokenizer: a text's ids, the special tokens around it, and an id to fill up with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import TYPE_CHECKING

from overture.errors import DataError
from overture.prompt import SoftPrompt, Value, VirtualTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "eos_ids",
    "filler_id",
    "lead_at",
    "leading_specials",
    "place_id",
    "prompt_ids",
    "specials_in_front",
    "text_ids",
    "trailing_specials",
]


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenize a text as it is, without adding special tokens.

    Raises:
        DataError: the text is not valid Unicode.
    """
    _check_unicode(text)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenize a text that something shall follow: special tokens in front of it, none behind it.

    Raises:
        DataError: the text is not valid Unicode.
    """
    _check_unicode(text)
    ids, added = _with_marks(tokenizer, text)
    if 0 not in added:
        return leading_specials(tokenizer)
    return ids[: len(ids) - added[::-1].index(0)]


def leading_specials(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens the tokenizer puts in front of a text: bos, [CLS], or none."""
    ids, added = _with_marks(tokenizer, "a")
    return ids[: added.index(0)] if 0 in added else []


def trailing_specials(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens the tokenizer puts behind a text: [SEP], eos, or none."""
    ids, added = _with_marks(tokenizer, "a")
    return ids[len(ids) - added[::-1].index(0) :] if 0 in added else []


def specials_in_front(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> int:
    """How many special tokens stand in front of a row, where virtual tokens and cuts must leave them."""
    specials = leading_specials(tokenizer)
    if specials and list(ids[: len(specials)]) == specials:
        return len(specials)
    # A chat template may write a bos of its own.
    return int(ids[0] == tokenizer.bos_token_id)


def lead_at(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], prompt: SoftPrompt | Value) -> int:
    """The position of a row before which leading virtual tokens stand, where they do not run ahead."""
    value = prompt.value if isinstance(prompt, SoftPrompt) else prompt
    first = isinstance(value, VirtualTokens) and value.before_specials
    return 0 if first else specials_in_front(tokenizer, ids)


def eos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that ends a text, if the tokenizer has one."""
    return [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else []


def filler_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id at masked positions: the padding token's, else eos, else 0. It is never read."""
    if isinstance(tokenizer.pad_token_id, int):
        return tokenizer.pad_token_id
    return next(iter(eos_ids(tokenizer)), 0)


def place_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id under virtual tokens: an ordinary token's, because some models number positions or pool by special ids."""
    special = set(tokenizer.all_special_ids)
    return next(i for i in count() if i not in special)


def _with_marks(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """The ids with all special tokens, and 1 where the tokenizer added one."""
    encoded = tokenizer(text, return_special_tokens_mask=True, return_attention_mask=False, verbose=False)
    return list(encoded["input_ids"]), list(encoded["special_tokens_mask"])


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            expected="valid Unicode text",
            got=f"half of a surrogate pair, U+{ord(text[error.start]):04X}",
            do="write the text again as UTF-8",
        ) from None
