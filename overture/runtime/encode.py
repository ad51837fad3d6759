"""From texts, chats and data rows to token ids: the prompt side of every row, in training and in use alike.

Shape suffixes: B rows, T text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count, groupby, islice
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import torch
from jaxtyping import Int
from torch import Tensor

from overture.errors import ConfigError, DataError
from overture.prompt import SoftPrompt, Value
from overture.runtime.chat import Message, check_messages, render, short
from overture.runtime.host import stands_in_text
from overture.runtime.tokens import filler_id, leading_specials, prompt_ids, text_ids
from overture.spec import ModelSpec
from overture.template import Template, Text, Virtual

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Encoded", "Item", "batch_rows", "encode", "encode_prompt", "has_text", "with_places"]

Item = str | Sequence[Message] | Mapping[str, Any]
"""One input: a text, a list of messages, or a row of data."""


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A batch of inputs."""

    input_ids: Int[Tensor, "B T"]
    """Token ids; padding and mid-text virtual tokens hold the padding token's id."""
    attention_mask: Int[Tensor, "B T"]
    """1 for text and for mid-text virtual tokens, 0 for padding."""
    slots: Int[Tensor, "B T"] | None
    """-1 for text and padding, else the index of the virtual token that stands there; None if no row has any."""

    def to(self, device: torch.device | str) -> Encoded:
        """The same batch on another device."""
        slots = None if self.slots is None else self.slots.to(device)
        return Encoded(self.input_ids.to(device), self.attention_mask.to(device), slots)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    prompts: Sequence[SoftPrompt | Value | None] | None = None,
    *,
    spec: ModelSpec | None = None,
    padding_side: Literal["left", "right"] = "left",
) -> Encoded:
    """Encode a batch of inputs, each for its own prompt.

    Args:
        tokenizer: the base model's tokenizer. It needs no padding token.
        items: one input per row: a text, a list of messages, or a mapping with the template's columns (without a
            template: with `prompt`, `messages` or `text`).
        prompts: the prompt of each row, for its template; None for no prompts.
        spec: the base model's shape. Needed where leading virtual tokens cannot run ahead of the text (encoders, and
            models without an attention seam): they then get places in front of the text.
        padding_side: where shorter rows are filled up.

    Returns:
        The batch, on the CPU.

    Raises:
        DataError: no inputs, or an input that its template or the chat template cannot use.
        ConfigError: not one prompt per input, or another padding side.
        UnsupportedModelError: messages, and a tokenizer without a chat template.
    """
    if padding_side not in ("left", "right"):
        raise ConfigError(
            expected="padding_side 'left' or 'right'", got=repr(padding_side), do="use 'left' to generate"
        )
    if isinstance(items, str | Mapping) or not items:
        got = "none" if not items else f"a single {type(items).__name__}"
        raise DataError(expected="a list of at least one input", got=got, do="put the inputs into a list")
    prompts = [None] * len(items) if prompts is None else prompts
    if len(prompts) != len(items):
        raise ConfigError(
            expected=f"one prompt per input, {len(items)} in all",
            got=f"{len(prompts)} prompts",
            do="pass a list with a prompt or None for every input",
        )
    rows: list[tuple[list[int], list[int] | None]] = []
    for number, (item, prompt) in enumerate(zip(items, prompts, strict=True), 1):
        try:
            ids, slots = encode_prompt(tokenizer, item, prompt.template if isinstance(prompt, SoftPrompt) else None)
        except DataError as error:
            if len(items) == 1:
                raise
            raise DataError(expected=error.expected, got=f"{error.got} (input {number})", do=error.do) from None
        if slots is None and spec is not None and prompt is not None and stands_in_text(spec, prompt):
            ids, slots = with_places(ids, prompt.length, filler_id(tokenizer))
        rows.append((ids, slots))
    return batch_rows(rows, filler_id(tokenizer), padding_side)


def batch_rows(rows: Sequence[tuple[list[int], list[int] | None]], filler: int, side: str) -> Encoded:
    """Rows of ids and slots as one batch, filled up with `filler` on `side`."""
    width = max(len(ids) for ids, _ in rows)
    input_ids = torch.full((len(rows), width), filler, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    slots = torch.full_like(input_ids, -1)
    for number, (ids, places) in enumerate(rows):
        window = slice(width - len(ids), width) if side == "left" else slice(0, len(ids))
        input_ids[number, window] = torch.tensor(ids)
        attention_mask[number, window] = 1
        if places is not None:
            slots[number, window] = torch.tensor(places)
    return Encoded(input_ids, attention_mask, slots if any(places is not None for _, places in rows) else None)


def with_places(ids: Sequence[int], length: int, filler: int) -> tuple[list[int], list[int]]:
    """Token ids with places for `length` virtual tokens in front, and their slots."""
    return [filler] * length + list(ids), [*range(length), *[-1] * len(ids)]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, item: Item, template: Template | None = None
) -> tuple[list[int], list[int] | None]:
    """Encode the prompt side of one row: what the model reads before it answers.

    The tokenizer's leading special tokens (such as bos) come first; its trailing ones (eos, sep) are left out.

    Args:
        tokenizer: the base model's tokenizer.
        item: a text, a list of messages, or a mapping. With a template: a mapping with its columns, or a text if it
            has exactly one. Without: a mapping holds `prompt`, `messages` or `text`.
        template: where the virtual tokens stand; None (or a template of virtual tokens alone) means in front.

    Returns:
        The ids [T] and the slots [T]: -1 for text, else the index of the virtual token standing there, counted over
        the whole template. Slots are None if no virtual token stands inside the text; leading ones are not in the ids.

    Raises:
        DataError: the item cannot be used, or nothing is left to read.
        UnsupportedModelError: messages, and a tokenizer without a chat template.
    """
    if has_text(template):
        ids, slots = _fill(tokenizer, _columns(item, template), template)
    else:
        ids, slots = _plain(tokenizer, item), None
    if not ids:
        raise DataError(expected="a prompt with at least one token", got="an empty text", do="write a prompt")
    return ids, slots


def has_text(template: Template | None) -> TypeGuard[Template]:
    """Whether a template says what the model reads; one of virtual tokens alone means them in front, as None does."""
    return template is not None and not all(isinstance(segment, Virtual) for segment in template.segments)


def _plain(tokenizer: PreTrainedTokenizerBase, item: Item) -> list[int]:
    value, tools = (_prompt_of(item), item.get("tools")) if isinstance(item, Mapping) else (item, None)
    if isinstance(value, str):
        return prompt_ids(tokenizer, value)
    return text_ids(tokenizer, render(tokenizer, value, answer=True, tools=tools))


def _prompt_of(row: Mapping[str, Any]) -> str | Sequence[Message]:
    """The prompt side of a data row of one of the four shapes."""
    named = [name for name in ("prompt", "messages", "text") if name in row]
    if len(named) != 1:
        raise DataError(
            expected="an input with one of the columns prompt, messages, text",
            got=f"columns {', '.join(sorted(map(str, row))) or '(none)'}",
            do="name the input's text 'prompt', or use a prompt with a template",
        )
    name, value = named[0], row[named[0]]
    if name == "text":
        if not isinstance(value, str):
            raise DataError(expected="a string in 'text'", got=short(value), do="write the text as a string")
        return f"{value}\n" if "label" in row else value
    if name == "prompt" and isinstance(value, str):
        return value
    messages = check_messages(value, name)
    # In a row of data the last answer is what the model shall write.
    answered = name == "messages" and len(messages) > 1 and messages[-1]["role"] == "assistant"
    return messages[:-1] if answered else messages


def _columns(item: Item, template: Template) -> Mapping[str, Any]:
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


def _fill(
    tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], template: Template
) -> tuple[list[int], list[int] | None]:
    segments = list(template.fill(row))
    if template.leading:
        return prompt_ids(tokenizer, "".join(s.text for s in segments if isinstance(s, Text))), None
    ids = leading_specials(tokenizer)
    slots = [-1] * len(ids)
    numbers = count()
    # Words between two virtual tokens are tokenized as one text, as the model knows them.
    for virtual, run in groupby(segments, key=lambda segment: isinstance(segment, Virtual)):
        if virtual:
            places = list(islice(numbers, sum(s.count for s in run if isinstance(s, Virtual))))
            ids += [filler_id(tokenizer)] * len(places)
            slots += places
        else:
            new = text_ids(tokenizer, "".join(s.text for s in run if isinstance(s, Text)))
            ids += new
            slots += [-1] * len(new)
    return ids, slots
