"""Chats: what counts as one, and how the tokenizer's chat template writes it as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from overture.errors import DataError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Message", "check_messages", "render", "short"]

Message = Mapping[str, Any]


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
    if isinstance(value, Sequence) and value and all(map(_is_message, value)):
        return [dict(message) for message in value]
    raise DataError(
        expected=f'messages in {column!r}, such as [{{"role": "user", "content": "Hello"}}]',
        got=short(value),
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


def short(value: object, limit: int = 60) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
