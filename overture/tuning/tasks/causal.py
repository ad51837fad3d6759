"""Writing text: a decoder learns the tokens of an answer, each from those before it.

Prompt and completion are tokenized apart and joined, exactly as generation joins what it read and what it writes.

Shape suffixes: B rows, N target tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from overture.errors import DataError, UnsupportedModelError
from overture.prompt import SoftPrompt
from overture.runtime.encode import encode_prompt
from overture.runtime.fill import has_text
from overture.runtime.generate import generate_ids
from overture.runtime.reading import Reading, batch_rows
from overture.runtime.tokens import eos_ids, filler_id, leading_specials, text_ids
from overture.spec import ModelSpec
from overture.tuning.chats import chat_completion_ids, chat_ids
from overture.tuning.columns import require_columns, shape_of, target_column, text_of
from overture.tuning.data import Row
from overture.tuning.example import Example, TextExample
from overture.tuning.forward import Trained, token_losses
from overture.tuning.tasks.base import Builder, Form, Task, length_of
from overture.tuning.truncate import head, tail, too_long

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SHAPES", "CausalLM", "learned_places"]

SHAPES: dict[str, frozenset[str]] = {
    "prompt + completion": frozenset({"prompt", "completion"}),
    "messages": frozenset({"messages"}),
    "text": frozenset({"text"}),
    "text + label": frozenset({"text", "label"}),
}
"""The shapes a file may have, and the columns that make them. All other columns are left alone."""


class CausalLM(Task):
    """A decoder that writes the answer behind what it read."""

    name = "causal-lm"
    unit = "token"

    def check(self, model: PreTrainedModel) -> None:
        """Raise `UnsupportedModelError` if the model reads both ways."""
        spec = ModelSpec.of(model)
        # Without an attention call to be seen (GPT-J), only the class tells that the model writes from left to right.
        if spec.layers and not spec.is_decoder:
            raise UnsupportedModelError(
                expected="a causal language model",
                got=f"{type(model).__name__}, a model that sees the text on both sides",
                do="name the task (--task sequence-classification, token-classification, question-answering or "
                "masked-lm), or load the model with the Auto class of that task",
            )

    def builder(self, rows: Sequence[Row], form: Form) -> Builder:
        """Rows of one of `SHAPES`, or with a template: its columns and `completion` or `label`."""
        tokenizer, template = form.tokenizer, form.template
        if not has_text(template):
            encoder = _ENCODERS[shape_of(rows, SHAPES)]
            return lambda row: encoder(tokenizer, row)
        require_columns(rows, template)
        target = target_column(rows, ("completion", "label"))
        return lambda row: _join(encode_prompt(tokenizer, row, template), _completion_ids(tokenizer, row, target))

    def shortened(self, example: Example, form: Form, max_tokens: int) -> Example:
        """Prompts and earlier turns lose their left side, rows of text alone their right one."""
        assert isinstance(example, TextExample)
        cut = head(example, max_tokens) if example.all_text else tail(example, form.tokenizer, max_tokens)
        if cut.num_targets == 0:
            raise too_long(example, max_tokens)
        return cut

    def losses(
        self, model: PreTrainedModel, rows: Sequence[Trained], examples: Sequence[Example], filler: int
    ) -> Float[Tensor, " B"]:
        """Losses of the target tokens, summed over each row."""
        places = learned_places(examples)
        losses = self.target_losses(model, rows, examples, filler, places)
        owners = torch.tensor([r for r, _ in places], device=losses.device)
        return losses.new_zeros(len(examples)).index_add(0, owners, losses)

    def target_losses(
        self,
        model: PreTrainedModel,
        rows: Sequence[Trained],
        examples: Sequence[Example],
        filler: int,
        places: Sequence[tuple[int, int]],
    ) -> Float[Tensor, " N"]:
        """Cross-entropy (nats) of every target token, which stands behind one of `places`."""
        return token_losses(model, rows, examples, filler, places, [examples[r].ids[c + 1] for r, c in places])

    def measure(
        self, model: PreTrainedModel, trained: Trained, examples: Sequence[Example], form: Form, batch_size: int
    ) -> dict[str, float]:
        """Share of rows whose greedy answer is the completion, token by token up to the end-of-text token."""
        texts = [example for example in examples if isinstance(example, TextExample)]
        filler, ahead = filler_id(form.tokenizer), length_of(trained.value)
        context = ModelSpec.of(model).max_positions or 2**31
        hits = 0
        for group in _groups(texts, batch_size, context - ahead):
            sides = [example.split() for example in group]
            batch = batch_rows([side for side, _ in sides], filler, "left")
            room = max(len(answer) for _, answer in sides)
            assert trained.value is None or isinstance(trained.value, SoftPrompt), "only what is stored generates"
            rows = [trained.value] * len(group)
            new = generate_ids(model, rows, batch, filler=filler, max_new_tokens=room, do_sample=False)
            for answer, (_, wanted) in zip(new.tolist(), sides, strict=True):
                hits += answer[: len(wanted)] == list(wanted)
        return {"exact_match": hits / len(texts)}


def learned_places(examples: Sequence[Example]) -> list[tuple[int, int]]:
    """Row and column of every position before a target."""
    return [
        (r, c - 1)
        for r, example in enumerate(examples)
        if isinstance(example, TextExample)
        for c, target in enumerate(example.targets)
        if target and c
    ]


def _groups(examples: Sequence[TextExample], batch_size: int, room: int) -> Iterator[list[TextExample]]:
    """Runs of rows generated together, so that the longest answer fits behind the longest text."""
    group: list[TextExample] = []
    text = answer = 0
    for example in examples:
        span = example.answer
        text, answer = max(text, span.start), max(answer, span.stop - span.start)
        if group and (len(group) == batch_size or text + answer > room):
            yield group
            group, text, answer = [], span.start, span.stop - span.start
        group.append(example)
    yield group


_Encoder = Callable[["PreTrainedTokenizerBase", Mapping[str, Any]], TextExample]


def _join(prompt: Reading, completion: Sequence[int]) -> TextExample:
    return TextExample(
        ids=(*prompt.ids, *completion),
        targets=(False,) * len(prompt) + (True,) * len(completion),
        slots=prompt.slots and (*prompt.slots, *[-1] * len(completion)),
    )


def _completion_ids(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], column: str) -> list[int]:
    text = text_of(row, column, numbers=True)
    ids = text_ids(tokenizer, text) if text.strip() else []
    if not ids:
        raise DataError(
            expected=f"a {column} with at least one token to learn",
            got=repr(text),
            do=f"fill {column!r} or drop the row",
        )
    return ids + eos_ids(tokenizer)


def _from_pair(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> TextExample:
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
    read = encode_prompt(tokenizer, row)
    if prompt == "text":
        return _join(read, _completion_ids(tokenizer, row, "completion"))
    return _join(read, chat_completion_ids(tokenizer, row))


def _from_messages(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> TextExample:
    ids, targets = chat_ids(tokenizer, row)
    return TextExample(ids=tuple(ids), targets=tuple(targets))


def _from_text(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> TextExample:
    text = text_of(row, "text")
    ids = (*encode_prompt(tokenizer, text).ids, *eos_ids(tokenizer)) if text.strip() else ()
    # A special token in front is there for generation too; without one, the first token has no text before it.
    unlearned = max(1, len(leading_specials(tokenizer)))
    if len(ids) <= unlearned:
        raise DataError(
            expected="a text with at least one token to learn", got=repr(text), do="fill it or drop the row"
        )
    return TextExample(ids=ids, targets=(False,) * unlearned + (True,) * (len(ids) - unlearned), all_text=True)


def _from_labelled(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> TextExample:
    read = encode_prompt(tokenizer, {"text": text_of(row, "text"), "label": True})
    return _join(read, _completion_ids(tokenizer, row, "label"))


_ENCODERS: dict[str, _Encoder] = {
    "prompt + completion": _from_pair,
    "messages": _from_messages,
    "text": _from_text,
    "text + label": _from_labelled,
}
