"""From texts, chats and data rows to token ids: the prompt side of every row, in training and in use alike.

Shape suffixes: B rows, T text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from overture.errors import ConfigError, DataError, UnsupportedModelError
from overture.prompt import SoftPrompt, Value
from overture.runtime.host import stands_in_text
from overture.spec import ModelSpec
from overture.template import Template, Text, Virtual

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Encoded",
    "Item",
    "batch_rows",
    "check_messages",
    "encode",
    "encode_prompt",
    "filler_id",
    "leading_specials",
    "render",
    "text_ids",
    "with_places",
]

Message = Mapping[str, Any]

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
    if prompts is not None and len(prompts) != len(items):
        raise ConfigError(
            expected=f"one prompt per input, {len(items)} in all",
            got=f"{len(prompts)} prompts",
            do="pass a list with a prompt or None for every input",
        )
    rows: list[tuple[list[int], list[int] | None]] = []
    for number, item in enumerate(items):
        template = getattr(prompts[number], "template", None) if prompts is not None else None
        try:
            ids, places = encode_prompt(tokenizer, item, template)
        except DataError as error:
            if len(items) == 1:
                raise
            raise DataError(expected=error.expected, got=f"{error.got} (input {number + 1})", do=error.do) from None
        prompt = prompts[number] if prompts is not None else None
        if spec is not None and prompt is not None and places is None and stands_in_text(spec, prompt):
            ids, places = with_places(ids, prompt.length, filler_id(tokenizer))
        rows.append((ids, places))
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
    if template is None or all(isinstance(segment, Virtual) for segment in template.segments):
        ids, slots = _plain(tokenizer, item), None
    else:
        ids, slots = _fill(tokenizer, _columns(item, template), template)
    if not ids:
        raise DataError(expected="a prompt with at least one token", got="an empty text", do="write a prompt")
    return ids, slots


def _plain(tokenizer: PreTrainedTokenizerBase, item: Item) -> list[int]:
    if isinstance(item, str):
        return _with_leading_specials(tokenizer, item)
    if isinstance(item, Mapping):
        value = _prompt_of(item)
        if isinstance(value, str):
            return _with_leading_specials(tokenizer, value)
        return text_ids(tokenizer, render(tokenizer, value, answer=True, tools=item.get("tools")))
    return text_ids(tokenizer, render(tokenizer, item, answer=True))


def _prompt_of(row: Mapping[str, Any]) -> str | Sequence[Message]:
    """The prompt side of a data row of one of the four shapes."""
    named = [name for name in ("prompt", "messages", "text") if name in row]
    if len(named) != 1:
        raise DataError(
            expected="an input with one of the columns prompt, messages, text",
            got=f"columns {', '.join(sorted(map(str, row))) or '(none)'}",
            do="name the input's text 'prompt', or use a prompt with a template",
        )
    value = row[named[0]]
    if named == ["messages"]:
        messages = check_messages(value, "messages")
        # In a row of data the last answer is what the model shall write.
        return messages[:-1] if len(messages) > 1 and messages[-1]["role"] == "assistant" else messages
    if named == ["prompt"] and not isinstance(value, str):
        return check_messages(value, "prompt")
    if not isinstance(value, str):
        raise DataError(expected=f"a string in {named[0]!r}", got=_short(value), do="write the text as a string")
    return f"{value}\n" if named == ["text"] and "label" in row else value


def check_messages(value: object, column: str) -> list[dict[str, Any]]:
    """Check that a value is a chat: a list of at least one object with a role and a content.

    Args:
        value: what stands in the column.
        column: the column's name, for the error.

    Returns:
        The messages.

    Raises:
        DataError: it is something else.
    """
    good = isinstance(value, Sequence) and not isinstance(value, str | bytes) and len(value) > 0
    if good and isinstance(value, Sequence) and all(_is_message(message) for message in value):
        return [dict(message) for message in value]
    raise DataError(
        expected=f'messages in {column!r}, such as [{{"role": "user", "content": "Hello"}}]',
        got=_short(value),
        do="give each message a role and a content",
    )


def _is_message(value: object) -> bool:
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        return False
    content = value.get("content")
    return isinstance(content, str | list) or (content is None and bool(value.get("tool_calls")))


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, answer: bool, tools: Sequence[Any] | None = None
) -> str:
    """Write a chat as the text that the model reads.

    Args:
        tokenizer: a tokenizer with a chat template.
        messages: the chat.
        answer: whether to open the assistant's next turn.
        tools: descriptions of tools the assistant may call, as the chat template takes them.

    Returns:
        The text, its special tokens included.

    Raises:
        DataError: the messages are none, or the chat template refuses them.
        UnsupportedModelError: the tokenizer has no chat template.
    """
    chat = check_messages(messages, "messages")
    if not tokenizer.chat_template:
        raise UnsupportedModelError(
            expected="a tokenizer with a chat template, since the data holds messages",
            got=f"{tokenizer.name_or_path or type(tokenizer).__name__} without one",
            do="use a chat model, set tokenizer.chat_template, or write prompt and completion as plain text",
        )
    try:
        return str(
            tokenizer.apply_chat_template(
                chat, tools=list(tools) if tools else None, add_generation_prompt=answer, tokenize=False
            )
        )
    except Exception as error:  # a chat template is a program of its own and may raise anything
        raise DataError(
            expected="messages that the tokenizer's chat template accepts",
            got=f"its refusal: {error}",
            do="change the roles or their order",
        ) from error


def _columns(item: Item, template: Template) -> Mapping[str, Any]:
    columns = ", ".join(template.columns) or "(none)"
    if isinstance(item, str) and len(template.columns) == 1:
        return {template.columns[0]: item}
    if isinstance(item, Mapping):
        for name in template.columns:
            if name in item and not isinstance(item[name], str | int | float):
                raise DataError(
                    expected=f"text or a number in the column {name!r} of the template",
                    got=_short(item[name]),
                    do="write the column's value as text",
                )
        return item
    raise DataError(
        expected=f"an object with the columns of the template {template.source!r}: {columns}",
        got="a single text" if isinstance(item, str) else "messages",
        do=f"write the input as {json.dumps({name: '...' for name in template.columns})}",
    )


def _fill(
    tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], template: Template
) -> tuple[list[int], list[int] | None]:
    # Words between two virtual tokens are tokenized as one text, as the model knows them.
    pieces: list[Virtual | str] = []
    for segment in template.fill(row):
        if isinstance(segment, Text) and pieces and isinstance(pieces[-1], str):
            pieces[-1] += segment.text
        else:
            pieces.append(segment.text if isinstance(segment, Text) else segment)
    if template.leading:
        return _with_leading_specials(tokenizer, "".join(p for p in pieces if isinstance(p, str))), None
    ids = leading_specials(tokenizer)
    slots = [-1] * len(ids)
    filled = 0
    for piece in pieces:
        if isinstance(piece, str):
            new = text_ids(tokenizer, piece)
            slots += [-1] * len(new)
        else:
            new = [filler_id(tokenizer)] * piece.count
            slots += range(filled, filled + piece.count)
            filled += piece.count
        ids += new
    return ids, slots


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenize a text as it is, without adding special tokens.

    Raises:
        DataError: the text is not valid Unicode.
    """
    _check_unicode(text)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def leading_specials(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens the tokenizer puts in front of a text: bos, [CLS], or none."""
    ids, added = _with_marks(tokenizer, "a")
    return ids[: added.index(0)] if 0 in added else []


def _with_leading_specials(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    _check_unicode(text)
    ids, added = _with_marks(tokenizer, text)
    if 0 not in added:
        return leading_specials(tokenizer)
    return ids[: len(ids) - added[::-1].index(0)]


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


def filler_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id at masked positions and under virtual tokens: the padding token's, else eos, else 0. It is never read."""
    for name in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(name, int):
            return name
    return 0


def _short(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
