"""Templates filled with the columns of a row: words as token ids, virtual tokens as places between them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import count, groupby, islice
from typing import TYPE_CHECKING, Any, TypeGuard

from overture.errors import ConfigError, DataError
from overture.runtime.chat import Message, short
from overture.runtime.reading import Reading
from overture.runtime.tokens import leading_specials, place_id, prompt_ids, text_ids
from overture.template import Template, Text, Virtual

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Item", "columns_of", "common_template", "fill", "has_text"]

Item = str | Sequence[Message] | Mapping[str, Any]
"""One input: a text, a list of messages, or a row of data."""


def has_text(template: Template | None) -> TypeGuard[Template]:
    """Whether a template says what the model reads; one of virtual tokens alone means them in front, as None does."""
    return template is not None and not all(isinstance(segment, Virtual) for segment in template.segments)


def common_template(templates: Iterable[Template | None]) -> Template | None:
    """The one way in which prompts of one row read their text; None for the text as it is.

    Raises:
        ConfigError: there are several.
    """
    readings = {template.reading: template for template in templates if has_text(template)}
    if len(readings) > 1:
        raise ConfigError(
            expected="joined prompts that read their text in one way",
            got=" and ".join(map(repr, readings)),
            do="tune the prompts with one template, or all but one without",
        )
    return next(iter(readings.values()), None)


def columns_of(item: Item, template: Template) -> Mapping[str, Any]:
    """The columns of a template, from an item that may be a text alone.

    Raises:
        DataError: the item lacks a column, or a column holds no text.
    """
    if isinstance(item, str) and len(template.columns) == 1:
        return {template.columns[0]: item}
    if isinstance(item, Mapping):
        for name in template.columns:
            if name in item and not isinstance(item[name], str | int | float):
                raise DataError(
                    expected=f"text or a number in the column {name!r} of the template",
                    got=short(item[name]),
                    do="write the column's value as text",
                )
        return item
    columns = ", ".join(template.columns) or "(none)"
    raise DataError(
        expected=f"an object with the columns of the template {template.source!r}: {columns}",
        got="a single text" if isinstance(item, str) else "messages",
        do=f"write the input as {json.dumps({name: '...' for name in template.columns})}",
    )


def fill(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], template: Template) -> Reading:
    """What the model reads of a template: the special tokens in front, words, and places; nothing behind.

    Leading virtual tokens are left out: they run ahead of the text, or get their places behind the special tokens.
    """
    segments = list(template.fill(row))
    if template.leading:
        return Reading(ids=tuple(prompt_ids(tokenizer, "".join(s.text for s in segments if isinstance(s, Text)))))
    ids = leading_specials(tokenizer)
    slots = [-1] * len(ids)
    numbers = count()
    # Words between two virtual tokens are tokenized as one text, as the model knows them.
    for virtual, run in groupby(segments, key=lambda segment: isinstance(segment, Virtual)):
        if virtual:
            places = list(islice(numbers, sum(s.count for s in run if isinstance(s, Virtual))))
            ids += [place_id(tokenizer)] * len(places)
            slots += places
        else:
            new = text_ids(tokenizer, "".join(s.text for s in run if isinstance(s, Text)))
            ids += new
            slots += [-1] * len(new)
    return Reading(ids=tuple(ids), slots=tuple(slots))
