"""From rows to training examples: token ids, which of them count, and where virtual tokens stand between them.

Prompt and completion are tokenized apart and joined, exactly as generation joins what it read and what it writes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from overture.errors import DataError
from overture.runtime.encode import check_messages, encode_prompt, leading_specials, render, text_ids, with_places
from overture.template import Template, Virtual
from overture.tuning.data import BadRow, Row, raise_bad_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SHAPES", "Example", "encode_rows"]

SHAPES: dict[str, frozenset[str]] = {
    "prompt + completion": frozenset({"prompt", "completion"}),
    "messages": frozenset({"messages"}),
    "text": frozenset({"text"}),
    "text + label": frozenset({"text", "label"}),
}
"""The shapes a file may have, and the columns that make them. All other columns are left alone."""

_GENERATION = re.compile(r"\{%-?\s*generation\b")


@dataclass(frozen=True, slots=True)
class Example:
    """One training row as the model sees it. T tokens; leading virtual tokens are not among them."""

    ids: tuple[int, ...]
    """Token ids [T]."""
    targets: tuple[bool, ...]
    """[T]: True if this token is predicted and counts in the loss. The first never is: no text stands before it."""
    slots: tuple[int, ...] | None
    """[T]: -1 for text, else the index of the virtual token standing there; None if no virtual token stands inside."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_targets(self) -> int:
        """Tokens that count in the loss."""
        return sum(self.targets)

    def with_leading(self, length: int, filler: int) -> Example:
        """The row with places for `length` virtual tokens in front, for models that cannot run them ahead."""
        ids, slots = with_places(self.ids, length, filler)
        return Example(tuple(ids), (*[False] * length, *self.targets), tuple(slots))

    def split(self) -> tuple[tuple[list[int], list[int] | None], list[int]]:
        """What the model reads (ids and slots) before the row's last run of targets, and that run."""
        end = max(i for i, target in enumerate(self.targets) if target) + 1
        start = max((i for i in range(end) if not self.targets[i]), default=-1) + 1
        slots = None if self.slots is None else list(self.slots[:start])
        return (list(self.ids[:start]), slots), list(self.ids[start:end])

    def without_slots(self) -> Example:
        """The row without places for virtual tokens, as the frozen model reads it."""
        if self.slots is None:
            return self
        kept = [i for i, slot in enumerate(self.slots) if slot < 0]
        return Example(tuple(self.ids[i] for i in kept), tuple(self.targets[i] for i in kept), None)


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
    fitted = template is not None and not all(isinstance(segment, Virtual) for segment in template.segments)
    shape = None if fitted else _shape(rows)
    build = _template_builder(rows, template) if template is not None and shape is None else _BUILDERS[str(shape)]
    examples: list[Example] = []
    bad: list[BadRow] = []
    for row in rows:
        try:
            example = build(tokenizer, row.values)
            if len(example) > max_tokens:
                if not truncate:
                    raise _too_long(example, max_tokens)
                example = _head(example, max_tokens) if shape == "text" else _tail(example, tokenizer, max_tokens)
            examples.append(example)
        except DataError as error:
            bad.append((row.where, error))
    raise_bad_rows(bad)
    return examples


Builder = Callable[["PreTrainedTokenizerBase", Mapping[str, Any]], Example]


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
            got=f"{text!r}",
            do=f"fill {column!r} or drop the row",
        )
    return ids + _eos(tokenizer)


def _eos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else []


def _from_pair(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> Example:
    kinds = {name: "text" if isinstance(row.get(name), str) else "messages" for name in ("prompt", "completion")}
    for name in kinds:
        if row.get(name) is None:
            raise DataError(expected=f"a {name!r} in every row", got="none", do="fill it or drop the row")
    if kinds["prompt"] != kinds["completion"]:
        raise DataError(
            expected="text in both prompt and completion, or messages in both",
            got=f"{kinds['prompt']} in 'prompt', {kinds['completion']} in 'completion'",
            do="write both alike",
        )
    if kinds["prompt"] == "text":
        ids, _ = encode_prompt(tokenizer, row)
        return _join(ids, _completion_ids(tokenizer, row, "completion"))
    return _from_chat_pair(tokenizer, row)


def _from_chat_pair(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> Example:
    ids, _ = encode_prompt(tokenizer, row)
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
    answer = _close(tokenizer, _after(before, whole))
    learned = text_ids(tokenizer, answer) if any(_says_something(message) for message in completion) else []
    return _join(ids, _need_target(learned) + _eos_unless_closed(tokenizer, answer))


def _says_something(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return bool(content.strip() if isinstance(content, str) else content) or bool(message.get("tool_calls"))


def _need_target(ids: list[int]) -> list[int]:
    if ids:
        return ids
    raise DataError(
        expected="an assistant's answer with at least one token to learn",
        got="an empty answer",
        do="fill the answer or drop the row",
    )


def _after(before: str, whole: str) -> str:
    if whole.startswith(before):
        return whole[len(before) :]
    at = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(whole))
    raise DataError(
        expected="a chat template that writes a chat's first turns the same whatever follows",
        got=f"{before[at : at + 30]!r} when asked for an answer, {whole[at : at + 30]!r} in the whole chat",
        do="use a template that marks the answers with {% generation %}, or write prompt and completion as plain text",
    )


def _close(tokenizer: PreTrainedTokenizerBase, answer: str) -> str:
    """The answer up to its closing special token: generation stops there and never writes the white space behind it."""
    bare = answer.rstrip()
    return bare if bare.endswith(tuple(tokenizer.all_special_tokens)) else answer


def _eos_unless_closed(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    return [] if answer.endswith(tuple(tokenizer.all_special_tokens)) else _eos(tokenizer)


def _from_messages(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> Example:
    messages = check_messages(row.get("messages"), "messages")
    tools = row.get("tools")
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
        example = _marked(tokenizer, messages, tools)
    else:
        example = _by_prefixes(tokenizer, messages, answers, whole, tools)
    if not any(example.targets):
        _need_target([])
    return example


def _marked(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], tools: Any) -> Example:
    """Targets are what the chat template puts between `{% generation %}` and `{% endgeneration %}`."""
    encoded: Any = tokenizer.apply_chat_template(
        messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
    )
    targets = [bool(mark) for mark in encoded["assistant_masks"]]
    # What follows the last answer changes nothing the model learns from.
    end = max((i for i, target in enumerate(targets) if target), default=-1) + 1
    return Example(tuple(encoded["input_ids"][:end]), (False, *targets[1:end])[:end], None)


def _by_prefixes(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], answers: list[int], whole: str, tools: Any
) -> Example:
    """Targets are what the rendering of a chat gains when an answer joins it."""
    ids: list[int] = []
    targets: list[bool] = []
    written = 0
    for turn in answers:
        if turn == 0:
            raise DataError(expected="a message before the assistant's first", got="none", do="add the user's message")
        before = render(tokenizer, messages[:turn], answer=True, tools=tools)
        upto = render(tokenizer, messages[: turn + 1], answer=False, tools=tools)
        _after(upto, whole)
        answer = _close(tokenizer, _after(before, upto))
        pieces = [text_ids(tokenizer, whole[written : len(before)]), text_ids(tokenizer, answer)]
        if turn == answers[-1]:
            pieces[1] += _eos_unless_closed(tokenizer, answer)
        ids += pieces[0] + pieces[1]
        targets += [False] * len(pieces[0]) + [True] * len(pieces[1])
        written = len(before) + len(answer)
    return Example(tuple(ids), tuple(targets), None)


def _from_text(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> Example:
    text = _text_of(row, "text")
    ids = (encode_prompt(tokenizer, text)[0] if text.strip() else []) + _eos(tokenizer)
    unlearned = max(1, len(leading_specials(tokenizer)))
    if not text.strip() or len(ids) <= unlearned:
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


def _too_long(example: Example, max_tokens: int) -> DataError:
    return DataError(
        expected=f"at most {max_tokens} tokens",
        got=f"{len(example)} tokens, {sum(example.targets)} of them to learn",
        do="shorten the row, raise max_length, or pass --truncate",
    )


def _head(example: Example, max_tokens: int) -> Example:
    return Example(example.ids[:max_tokens], example.targets[:max_tokens], None)


def _tail(example: Example, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Example:
    """Drop text from the left, but not the special tokens in front, virtual tokens, or the last run of targets."""
    specials = tuple(leading_specials(tokenizer))
    if specials and example.ids[: len(specials)] == specials:
        first = len(specials)
    else:
        first = int(example.ids[0] == tokenizer.bos_token_id)
    last_run = 1 + max((i for i, (a, b) in enumerate(pairwise(example.targets)) if b and not a), default=-1)
    slots = example.slots or (-1,) * len(example)
    free = [i for i in range(first, last_run) if slots[i] == -1]
    # Something must stand before the answer, or its first token could not be predicted.
    spare = len(free) if len(free) < last_run else len(free) - 1
    excess = len(example) - max_tokens
    if excess > spare:
        error = _too_long(example, max_tokens)
        raise DataError(
            expected=error.expected,
            got=f"{error.got}, and too few others to cut",
            do="shorten the answer or raise max_length",
        )
    dropped = set(free[:excess])
    kept = [i for i in range(len(example)) if i not in dropped]
    return Example(
        ids=tuple(example.ids[i] for i in kept),
        targets=tuple(example.targets[i] for i in kept),
        slots=None if example.slots is None else tuple(example.slots[i] for i in kept),
    )
