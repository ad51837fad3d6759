"""From texts, chats and data rows to token ids: what the model reads of every row, in training and in use alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from overture.errors import ConfigError, DataError
from overture.prompt import SoftPrompt, Value
from overture.runtime.chat import Message, check_messages, render, short
from overture.runtime.fill import Item, columns_of, common_template, fill, has_text
from overture.runtime.host import stands_in_text
from overture.runtime.reading import Encoded, Reading, batch_rows
from overture.runtime.tokens import filler_id, lead_at, place_id, prompt_ids, text_ids
from overture.runtime.whole import encode_whole
from overture.spec import ModelSpec
from overture.template import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Encoded", "Item", "encode", "encode_prompt"]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    prompts: Sequence[SoftPrompt | Value | tuple[SoftPrompt | Value | None, ...] | None] | None = None,
    *,
    spec: ModelSpec | None = None,
    padding_side: Literal["left", "right"] | None = None,
    complete: bool = False,
) -> Encoded:
    """Encode a batch of inputs, each for its own prompt.

    Args:
        tokenizer: the base model's tokenizer. It needs no padding token.
        items: one input per row: a text, a list of messages, or a mapping with the template's columns (without a
            template: with `prompt`, `messages` or `text`).
        prompts: the prompt of each row, or a tuple of several that are joined, for their template; None for no prompts.
        spec: the base model's shape. Needed where leading virtual tokens cannot run ahead of the text (encoders, and
            models without an attention seam): they then get places behind the special tokens in front, or before
            them (`VirtualTokens.before_specials`).
        padding_side: where shorter rows are filled up; None for the right of complete texts, as encoders need it, and
            the left of others, as generation needs it.
        complete: whether nothing shall follow: the special tokens behind a text are written, too, as encoders and
            classifiers read it, and mappings may hold `text` and `text_pair`.

    Returns:
        The batch, on the CPU.

    Raises:
        DataError: no inputs, or an input that its template or the chat template cannot use.
        ConfigError: not one prompt per input, or another padding side.
        UnsupportedModelError: messages, and a tokenizer without a chat template.
    """
    if padding_side not in ("left", "right", None):
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
    rows: list[Reading] = []
    for number, (item, prompt) in enumerate(zip(items, prompts, strict=True), 1):
        pieces = prompt if isinstance(prompt, tuple) else (prompt,)
        template = common_template(piece.template for piece in pieces if isinstance(piece, SoftPrompt))
        try:
            row = encode_whole(tokenizer, item, template) if complete else encode_prompt(tokenizer, item, template)
        except DataError as error:
            if len(items) == 1:
                raise
            raise DataError(expected=error.expected, got=f"{error.got} (input {number})", do=error.do) from None
        alone = None if isinstance(prompt, tuple) else prompt
        if row.slots is None and spec is not None and alone is not None and stands_in_text(spec, alone):
            row = row.with_places(alone.length, lead_at(tokenizer, row.ids, alone), place_id(tokenizer))
        rows.append(row)
    return batch_rows(rows, filler_id(tokenizer), padding_side or ("right" if complete else "left"))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, item: Item, template: Template | None = None) -> Reading:
    """Encode the prompt side of one row: what the model reads before it answers.

    The tokenizer's leading special tokens (such as bos) come first; its trailing ones (eos, sep) are left out.

    Args:
        tokenizer: the base model's tokenizer.
        item: a text, a list of messages, or a mapping. With a template: a mapping with its columns, or a text if it
            has exactly one. Without: a mapping holds `prompt`, `messages` or `text`.
        template: where the virtual tokens stand; None (or a template of virtual tokens alone) means in front.

    Returns:
        The row. Virtual tokens are counted over the whole template; leading ones are not in the row.

    Raises:
        DataError: the item cannot be used, or nothing is left to read.
        UnsupportedModelError: messages, and a tokenizer without a chat template.
    """
    if has_text(template):
        row = fill(tokenizer, columns_of(item, template), template)
    else:
        row = Reading(ids=tuple(_plain(tokenizer, item)))
    if not row.ids:
        raise DataError(expected="a prompt with at least one token", got="an empty text", do="write a prompt")
    return row


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
