"""From rows to the examples of one prompt: how much text fits, and where the virtual tokens stand."""

from __future__ import annotations

from collections.abc import Sequence

from overture.errors import ContextLengthError, DataError
from overture.prompt import BlockInputs
from overture.runtime.generate import foreign_id
from overture.runtime.host import stands_in_text
from overture.runtime.prompts import Piece
from overture.runtime.tokens import lead_at, place_id
from overture.spec import ModelSpec
from overture.tuning.data import BadRow, Row, raise_bad_rows
from overture.tuning.example import Example
from overture.tuning.tasks.base import Form, Task, length_of
from overture.tuning.truncate import too_long

__all__ = ["encode_for", "encode_rows"]

_ENDLESS = 2**31


def encode_rows(
    task: Task, rows: Sequence[Row], form: Form, *, max_tokens: int, truncate: bool = False
) -> list[Example]:
    """Turn rows into examples.

    Args:
        task: what the model is trained to answer.
        rows: rows with the columns that the task or the template asks for.
        form: what they have in common.
        max_tokens: the most tokens an example may have, virtual tokens inside the text included; at least 2.
        truncate: let the task cut longer rows, instead of refusing them.

    Returns:
        One example per row, in order.

    Raises:
        DataError: mixed or unknown columns, or bad rows; the first five bad rows are named, and all are counted.
        UnsupportedModelError: messages, and a tokenizer without a chat template.
    """
    build = task.builder(rows, form)
    examples: list[Example] = []
    bad: list[BadRow] = []
    for row in rows:
        try:
            example = build(row.values)
            if len(example) > max_tokens and not truncate:
                raise too_long(example, max_tokens)
            examples.append(example if len(example) <= max_tokens else task.shortened(example, form, max_tokens))
        except DataError as error:
            bad.append((row.where, error))
    raise_bad_rows(bad)
    return examples


def encode_for(
    task: Task,
    spec: ModelSpec,
    prompt: Piece | None,
    form: Form,
    rows: Sequence[Row],
    *,
    ahead: int = 0,
    max_length: int | None = None,
    truncate: bool = False,
) -> list[Example]:
    """Turn rows into the examples of one prompt, with places for its virtual tokens where the text must hold them.

    Args:
        task: what the model is trained to answer.
        spec: the base model's.
        prompt: the prompt; None for the frozen model, which reads the rows without their places.
        form: what the rows have in common.
        rows: the rows.
        ahead: virtual tokens of another prompt in front of it.
        max_length: longest row in tokens, virtual tokens included; None for the model's context, as far as its rotation
            stays the same where virtual tokens run ahead.
        truncate: cut rows that are too long, instead of refusing them.

    Raises:
        DataError: rows that cannot be used, or ids the model has no embedding for.
        ContextLengthError: the virtual tokens leave no room for text.
    """
    template, tokenizer = form.template, form.tokenizer
    # Virtual tokens of a template count among an example's own tokens, leading ones do not.
    inside = template is not None and not template.leading
    places = template.num_virtual_tokens if template is not None and inside else 0
    runs_ahead = isinstance(prompt, BlockInputs) or not (prompt is None or inside or stands_in_text(spec, prompt))
    # Keys that were computed ahead are those of one rotation.
    limits = (max_length, spec.max_positions, spec.rotary_limit if ahead or runs_ahead else None)
    room = _room(limits, ahead + (places if prompt is None else length_of(prompt)))
    examples = encode_rows(task, rows, form, max_tokens=room + places, truncate=truncate)
    raise_bad_rows(_foreign(spec, rows, examples))
    if prompt is None:
        return [example.without_places() for example in examples]
    if not isinstance(prompt, BlockInputs) and stands_in_text(spec, prompt) and not inside:
        length, filler = length_of(prompt), place_id(tokenizer)
        return [e.with_places(length, lead_at(tokenizer, e.ids, prompt), filler) for e in examples]
    return examples


def _room(limits: Sequence[int | None], length: int) -> int:
    """Tokens left for text beside the virtual tokens."""
    context = min(limit or _ENDLESS for limit in limits)
    if context - length < 2:
        raise ContextLengthError(
            expected=f"virtual tokens that leave room for text in a context of {context} tokens",
            got=f"{length} virtual tokens",
            do="use fewer virtual tokens (10 to 50 are usual) or a larger max_length",
        )
    return context - length


def _foreign(spec: ModelSpec, rows: Sequence[Row], examples: Sequence[Example]) -> list[BadRow]:
    return [
        (row.where, foreign_id(max(e.ids), spec.vocab_size))
        for row, e in zip(rows, examples, strict=True)
        if max(e.ids) >= spec.vocab_size
    ]
