"""From rows to training examples: the four shapes of data, and templates.

Prompt and completion are tokenized apart and joined, exactly as generation joins what it read and what it writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from overture.errors import DataError
from overture.runtime.encode import encode_prompt, has_text
from overture.runtime.tokens import eos_ids, leading_specials, text_ids
from overture.template import Template
from overture.tuning.chats import chat_completion_ids, chat_ids
from overture.tuning.data import BadRow, Row, raise_bad_rows
from overture.tuning.example import Example
from overture.tuning.truncate import head, tail, too_long

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SHAPES", "encode_rows"]

SHAPES: dict[str, frozenset[str]] = {
    "prompt + completion": frozenset({"prompt", "completion"}),
    "messages": frozenset({"messages"}),
    "text": frozenset({"text"}),
    "text + label": frozenset({"text", "label"}),
}
"""The shapes a file may have, and the columns that make them. All other columns are left alone."""

Builder = Callable[["PreTrainedTokenizerBase", Mapping[str, Any]], Example]


def encode_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: Template | None = None,
    max_tokens: int,
    truncate: bool = False,
) -> list[Example]:
    """Turn rows into training examples.

    Args:
        rows: rows of one shape (see `SHAPES`), or with a template: rows with its columns and `completion` or `label`.
        tokenizer: the base model's tokenizer.
        template: where the virtual tokens stand; None means in front of the text.
        max_tokens: the most tokens an example may have, virtual tokens inside the text included; at least 2.
        truncate: cut longer rows instead of refusing them: prompts and earlier turns from their left, `text` rows
            from their right. Special tokens in front, virtual tokens and the completion stay.

    Returns:
        One example per row, in order.

    Raises:
        DataError: mixed or unknown columns, or bad rows; the first five bad rows are named, and all are counted.
        UnsupportedModelError: messages, and a tokenizer without a chat template.
    """
    shape = None
    if has_text(template):
        build = _template_builder(rows, template)
    else:
        shape = _shape(rows)
        build = _BUILDERS[shape]
    examples: list[Example] = []
    bad: list[BadRow] = []
    for row in rows:
        try:
            example = build(tokenizer, row.values)
            if len(example) > max_tokens:
                if not truncate:
                    raise too_long(example, max_tokens)
                example = head(example, max_tokens) if shape == "text" else tail(example, tokenizer, max_tokens)
                if example.num_targets == 0:
                    raise too_long(example, max_tokens)
            examples.append(example)
        except DataError as error:
            bad.append((row.where, error))
    raise_bad_rows(bad)
    return examples


def _shape(rows: Sequence[Row]) -> str:
    """The one shape that the columns of all rows make."""
    known = frozenset[str]().union(*SHAPES.values())
    first: dict[str, str] = {}
    for row in rows:
        for name in row.values:
            first.setdefault(str(name), row.where)
    present = known & set(first)
    for shape, columns in SHAPES.items():
        if present == columns:
            return shape
    found = ", ".join(f"{name} (first in {first[name]})" if name in known else name for name in sorted(first))
    raise DataError(
        expected=f"the columns of one shape: {'; '.join(SHAPES)}",
        got=f"columns {found or '(none)'}",
        do="keep the columns of one shape in every row and rename the others, or pass a template that names yours",
    )


def _text_of(row: Mapping[str, Any], column: str, *, numbers: bool = False) -> str:
    value = row.get(column)
    if isinstance(value, str) or (numbers and isinstance(value, int | float)):
        return str(value)
    got = f"no {column!r}" if value is None else f"{type(value).__name__} in {column!r}"
    raise DataError(expected=f"text in the column {column!r}", got=got, do=f"write text into {column!r} in every row")


def _join(prompt: Sequence[int], completion: Sequence[int], slots: Sequence[int] | None = None) -> Example:
    return Example(
        ids=(*prompt, *completion),
        targets=(False,) * len(prompt) + (True,) * len(completion),
        slots=None if slots is None else (*slots, *[-1] * len(completion)),
    )


def _completion_ids(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], column: str) -> list[int]:
    text = _text_of(row, column, numbers=True)
    ids = text_ids(tokenizer, text) if text.strip() else []
    if not ids:
        raise DataError(
            expected=f"a {column} with at least one token to learn",
            got=repr(text),
            do=f"fill {column!r} or drop the row",
        )
    return ids + eos_ids(tokenizer)


def _from_pair(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> Example:
    for name in ("prompt", "completion"):
        if row.get(name) is None:
            raise DataError(expected=f"a {name!r} in every row", got="none", do="fill it or drop the row")
    prompt, completion = ("text" if isinstance(row[name], str) else "messages" for name in ("prompt", "completion"))
    if prompt != completion:
        raise DataError(
            expected="text in both prompt and completion, or messages in both",
            got=f"{prompt} in 'prompt', {completion} in 'completion'",
            do="write both alike",
        )
    ids, _ = encode_prompt(tokenizer, row)
    if prompt == "text":
        return _join(ids, _completion_ids(tokenizer, row, "completion"))
    return _join(ids, chat_completion_ids(tokenizer, row))


def _from_messages(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> Example:
    ids, targets = chat_ids(tokenizer, row)
    return Example(tuple(ids), tuple(targets), None)


def _from_text(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> Example:
    text = _text_of(row, "text")
    ids = encode_prompt(tokenizer, text)[0] + eos_ids(tokenizer) if text.strip() else []
    # A special token in front is there for generation too; without one, the first token has no text before it.
    unlearned = max(1, len(leading_specials(tokenizer)))
    if len(ids) <= unlearned:
        raise DataError(
            expected="a text with at least one token to learn", got=repr(text), do="fill it or drop the row"
        )
    return Example(tuple(ids), (False,) * unlearned + (True,) * (len(ids) - unlearned), None)


def _from_labelled(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> Example:
    ids, _ = encode_prompt(tokenizer, {"text": _text_of(row, "text"), "label": True})
    return _join(ids, _completion_ids(tokenizer, row, "label"))


_BUILDERS: dict[str, Builder] = {
    "prompt + completion": _from_pair,
    "messages": _from_messages,
    "text": _from_text,
    "text + label": _from_labelled,
}


def _template_builder(rows: Sequence[Row], template: Template) -> Builder:
    """How a row becomes an example with a template, once every column it needs is known to be there."""
    present = {str(name) for row in rows for name in row.values}
    found = f"columns {', '.join(sorted(present)) or '(none)'}"
    missing = [name for name in template.columns if name not in present]
    if missing:
        raise DataError(
            expected=f"the columns that the template {template.source!r} names: {', '.join(template.columns)}",
            got=f"{found}; none is called {' or '.join(map(repr, missing))}",
            do="rename the column in the data or in the template",
        )
    target = next((name for name in ("completion", "label") if name in present), None)
    if target is None:
        raise DataError(
            expected="a column 'completion' or 'label' with the answer to learn",
            got=found,
            do="rename the column that holds the answers",
        )

    def build(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> Example:
        ids, slots = encode_prompt(tokenizer, row, template)
        return _join(ids, _completion_ids(tokenizer, row, target), slots)

    return build
