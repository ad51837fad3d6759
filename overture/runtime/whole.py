"""Whole texts: rows to which nothing is added, between all special tokens, as encoders and classifiers read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from overture.errors import DataError, UnsupportedModelError
from overture.runtime.chat import short
from overture.runtime.fill import Item, columns_of, fill, has_text
from overture.runtime.reading import Reading
from overture.runtime.tokens import text_ids, trailing_specials
from overture.template import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["complete_row", "encode_whole", "has_types"]


def encode_whole(tokenizer: PreTrainedTokenizerBase, item: Item, template: Template | None = None) -> Reading:
    """Encode one row to which nothing is added, between all its special tokens, as encoders and classifiers read it.

    Args:
        tokenizer: the base model's tokenizer.
        item: a text, or a mapping with `text` and perhaps `text_pair`, or with `prompt`. With a template: a mapping
            with its columns, or a text if it has exactly one. The column `mask` is the tokenizer's mask token.
        template: where the virtual tokens stand; None (or a template of virtual tokens alone) means in front.

    Raises:
        DataError: the item cannot be used, or has no text.
        UnsupportedModelError: a template with `{mask}`, and a tokenizer without a mask token.
    """
    if not has_text(template):
        text, pair = _texts(item)
        return complete_row(tokenizer, text, pair)
    row = fill(tokenizer, columns_of(_masked(tokenizer, item, template), template), template)
    end = trailing_specials(tokenizer)
    ids, slots = (*row.ids, *end), row.slots and (*row.slots, *[-1] * len(end))
    return Reading(ids=ids, slots=slots, types=(0,) * len(ids) if has_types(tokenizer) else None)


def complete_row(tokenizer: PreTrainedTokenizerBase, text: str, pair: str | None = None) -> Reading:
    """A text, or two, as the tokenizer itself writes them."""
    for some in (text, pair or ""):
        text_ids(tokenizer, some)  # refuses what is no Unicode
    encoded: Any = tokenizer(text, pair, return_token_type_ids=has_types(tokenizer), verbose=False)
    types = tuple(encoded["token_type_ids"]) if has_types(tokenizer) else None
    return Reading(ids=tuple(encoded["input_ids"]), types=types)


def has_types(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the model is told which of two texts a token is of."""
    return "token_type_ids" in tokenizer.model_input_names


def _texts(item: Item) -> tuple[str, str | None]:
    """The text or the two texts of an item without a template."""
    row = {"text": item} if isinstance(item, str) else item
    if isinstance(row, Mapping) and "text" not in row and isinstance(row.get("prompt"), str):
        return row["prompt"], None
    if not isinstance(row, Mapping) or "text" not in row:
        raise DataError(
            expected="a text, or an object with the column text (and perhaps text_pair)",
            got=f"columns {', '.join(sorted(map(str, row))) or '(none)'}" if isinstance(row, Mapping) else "messages",
            do="name the input's text 'text', or use a prompt with a template",
        )
    for name in ("text", "text_pair"):
        if name in row and (not isinstance(row[name], str) or not row[name].strip()):
            raise DataError(expected=f"text in the column {name!r}", got=short(row[name]), do="fill it or drop the row")
    return row["text"], row.get("text_pair")


def _masked(tokenizer: PreTrainedTokenizerBase, item: Item, template: Template) -> Item:
    """The item with the mask token in the column `mask`, if the template has one."""
    if "mask" not in template.columns:
        return item
    if tokenizer.mask_token is None:
        raise UnsupportedModelError(
            expected=f"a tokenizer with a mask token, for the {{mask}} of the template {template.source!r}",
            got=f"{type(tokenizer).__name__} without one",
            do="use a masked language model, such as BERT",
        )
    others = [name for name in template.columns if name != "mask"]
    if isinstance(item, str) and len(others) == 1:
        item = {others[0]: item}
    return {**item, "mask": tokenizer.mask_token} if isinstance(item, Mapping) else item
