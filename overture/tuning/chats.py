"""Which tokens of a chat are learned: those the assistant writes, up to the token that ends its turn."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from overture.errors import DataError
from overture.runtime.chat import check_messages, render
from overture.runtime.tokens import eos_ids, text_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["chat_completion_ids", "chat_ids"]

_GENERATION = re.compile(r"\{%-?\s*generation\b")


def chat_completion_ids(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> list[int]:
    """The ids to learn of a row whose `prompt` and `completion` are messages.

    Raises:
        DataError: the completion is no answer, or the chat template does not continue the prompt with it.
    """
    prompt = check_messages(row["prompt"], "prompt")
    completion = check_messages(row["completion"], "completion")
    if any(message["role"] != "assistant" for message in completion):
        raise DataError(
            expected="only assistant messages in 'completion'",
            got=", ".join(message["role"] for message in completion),
            do="write the whole chat as 'messages'; the loss then counts the assistant's turns only",
        )
    before = render(tokenizer, prompt, answer=True, tools=row.get("tools"))
    whole = render(tokenizer, [*prompt, *completion], answer=False, tools=row.get("tools"))
    answer = _answer(tokenizer, before, whole)
    ids = text_ids(tokenizer, answer)
    if not ids or not any(map(_says_something, completion)):
        raise _nothing_to_learn()
    return ids + _eos_unless_closed(tokenizer, answer)


def chat_ids(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
    """The ids of a row's `messages` up to the last answer, and for each whether it is learned.

    Raises:
        DataError: no answer, or a chat template that neither marks answers nor keeps a chat's first turns as they are.
    """
    messages, tools = check_messages(row.get("messages"), "messages"), row.get("tools")
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not any(_says_something(messages[i]) for i in answers):
        raise DataError(
            expected="at least one assistant message with words to learn",
            got=f"the roles {', '.join(message['role'] for message in messages)}",
            do="add the assistant's answer, role 'assistant'",
        )
    # Rendering first also checks that there is a template and that it accepts the messages.
    whole = render(tokenizer, messages, answer=False, tools=tools)
    if tokenizer.is_fast and _GENERATION.search(tokenizer.get_chat_template(tools=tools)):
        ids, targets = _marked(tokenizer, messages, tools)
    else:
        ids, targets = _by_prefixes(tokenizer, messages, answers, whole, tools)
    if not any(targets):
        raise _nothing_to_learn()
    return ids, targets


def _marked(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], tools: Any
) -> tuple[list[int], list[bool]]:
    """Targets are what the chat template puts between `{% generation %}` and `{% endgeneration %}`."""
    encoded: Any = tokenizer.apply_chat_template(
        messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
    )
    # The first token has no text before it to predict it from.
    targets = [bool(mark) and i > 0 for i, mark in enumerate(encoded["assistant_masks"])]
    # What follows the last answer changes nothing the model learns from.
    end = max((i for i, target in enumerate(targets) if target), default=-1) + 1
    return encoded["input_ids"][:end], targets[:end]


def _by_prefixes(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], answers: list[int], whole: str, tools: Any
) -> tuple[list[int], list[bool]]:
    """Targets are what the rendering of a chat gains when an answer joins it."""
    if answers[0] == 0:
        raise DataError(expected="a message before the assistant's first", got="none", do="add the user's message")
    ids: list[int] = []
    targets: list[bool] = []
    written = 0
    for turn in answers:
        before = render(tokenizer, messages[:turn], answer=True, tools=tools)
        upto = render(tokenizer, messages[: turn + 1], answer=False, tools=tools)
        _after(upto, whole)
        answer = _answer(tokenizer, before, upto)
        read = text_ids(tokenizer, whole[written : len(before)])
        learned = text_ids(tokenizer, answer)
        if turn == answers[-1]:
            learned += _eos_unless_closed(tokenizer, answer)
        ids += read + learned
        targets += [False] * len(read) + [True] * len(learned)
        written = len(before) + len(answer)
    return ids, targets


def _says_something(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return bool(content.strip() if isinstance(content, str) else content) or bool(message.get("tool_calls"))


def _nothing_to_learn() -> DataError:
    return DataError(
        expected="an assistant's answer with at least one token to learn",
        got="an empty answer",
        do="fill the answer or drop the row",
    )


def _answer(tokenizer: PreTrainedTokenizerBase, before: str, whole: str) -> str:
    """What `whole` adds, up to its closing special token: generation never writes the white space behind that."""
    answer = _after(before, whole)
    bare = answer.rstrip()
    return bare if _closed(tokenizer, bare) else answer


def _after(before: str, whole: str) -> str:
    if whole.startswith(before):
        return whole[len(before) :]
    at = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(whole))
    raise DataError(
        expected="a chat template that writes a chat's first turns the same whatever follows",
        got=f"{before[at : at + 30]!r} when asked for an answer, {whole[at : at + 30]!r} in the whole chat",
        do="use a template that marks the answers with {% generation %}, or write prompt and completion as plain text",
    )


def _closed(tokenizer: PreTrainedTokenizerBase, answer: str) -> bool:
    return answer.endswith(tuple(tokenizer.all_special_tokens))


def _eos_unless_closed(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    return [] if _closed(tokenizer, answer) else eos_ids(tokenizer)
