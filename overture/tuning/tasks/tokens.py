"""Token classification: one label for each word.

A word's label stands at its first token; the others, special tokens and virtual tokens carry none.

Shape suffixes: B rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from overture.errors import DataError
from overture.prompt import Head
from overture.runtime.chat import short
from overture.runtime.fill import Item
from overture.runtime.head_module import start_head
from overture.runtime.heads import own_labels
from overture.runtime.tokens import filler_id
from overture.runtime.whole import has_types
from overture.tuning.columns import target_column
from overture.tuning.data import BadRow, Row, raise_bad_rows
from overture.tuning.example import Example
from overture.tuning.forward import Trained, precise, run
from overture.tuning.labels import accuracy, label_name, label_names, macro_f1, position_of
from overture.tuning.predictions import Prediction, Tags
from overture.tuning.spans import located, tokens_of_words
from overture.tuning.tasks.base import Builder, Form, PredictingTask, refuse_template, refuse_words

__all__ = ["TaggedExample", "TokenClassification", "entities"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaggedExample(Example):
    """Words and their labels."""

    words: tuple[int, ...]
    """For each word, which of the row's text tokens is its first."""
    labels: tuple[int, ...]
    """Index of each word's label; empty if they are to be predicted."""

    @property
    def num_targets(self) -> int:
        """Words that count in the loss."""
        return len(self.words)


class TokenClassification(PredictingTask):
    """A label for every word."""

    name = "token-classification"
    unit = "word"

    def head(
        self, model: PreTrainedModel, form: Form, rows: Sequence[Row], words: Any, generator: Generator
    ) -> Head | None:
        """The model's own labels, or the data's."""
        refuse_words(self.name, words)
        target_column(rows, ("tags",))
        bad: list[BadRow] = []
        found: set[str] = set()
        for row in rows:
            try:
                found.update(_tags(row.values))
            except DataError as error:
                bad.append((row.where, error))
        raise_bad_rows(bad)
        return start_head(model, self.name, label_names(found, model), generator)

    def builder(self, rows: Sequence[Row], form: Form) -> Builder:
        """Rows with `tokens` and as many `tags`."""
        refuse_template(self.name, form.template)
        target_column(rows, ("tokens",))
        if form.answered:
            target_column(rows, ("tags",))
        labels = form.head.labels if form.head else ()

        def build(row: Mapping[str, Any]) -> TaggedExample:
            words = _words(row)
            encoded, _, spans = located(form.tokenizer, " ".join(words))
            first = tokens_of_words(words, spans)
            if None in first:
                raise DataError(
                    expected="words that the tokenizer gives at least one token",
                    got=f"{words[first.index(None)]!r}, which it leaves out",
                    do="drop the word and its tag",
                )
            tags = _tags(row) if form.answered else []
            if form.answered and len(tags) != len(words):
                raise DataError(
                    expected=f"as many tags as tokens, {len(words)}", got=str(len(tags)), do="tag each token once"
                )
            return TaggedExample(
                ids=tuple(encoded["input_ids"]),
                types=tuple(encoded["token_type_ids"]) if has_types(form.tokenizer) else None,
                words=tuple(place for place in first if place is not None),
                labels=tuple(position_of(tag, labels) for tag in tags),
            )

        return build

    def row_of(self, item: Item, form: Form) -> Mapping[str, Any]:
        """A text is cut into words at its spaces."""
        return {"tokens": item.split()} if isinstance(item, str) else super().row_of(item, form)

    def losses(
        self, model: PreTrainedModel, rows: Sequence[Trained], examples: Sequence[Example], filler: int
    ) -> Float[Tensor, " B"]:
        """Cross-entropy of the words' labels, summed over each row."""
        logits = precise(run(model, rows, examples, filler).logits)
        places = list(_places(examples))
        row, column = torch.tensor(places, device=logits.device).unbind(1)
        wanted = torch.tensor([i for e in examples if isinstance(e, TaggedExample) for i in e.labels])
        losses = cross_entropy(logits[row, column], wanted.to(logits.device), reduction="none")
        return losses.new_zeros(len(examples)).index_add(0, row, losses)

    def predict(
        self, model: PreTrainedModel, rows: Sequence[Trained], examples: Sequence[Example], form: Form
    ) -> list[Prediction]:
        """The likeliest label of each word."""
        probabilities = precise(run(model, rows, examples, filler_id(form.tokenizer)).logits).softmax(-1)
        found: list[list[tuple[str, float]]] = [[] for _ in examples]
        for row, column in _places(examples):
            head = rows[row].head
            labels = own_labels(model) if head is None else head.labels
            best = int(probabilities[row, column].argmax())
            found[row].append((labels[best], float(probabilities[row, column, best])))
        return [Tags(tuple(label for label, _ in row), tuple(share for _, share in row)) for row in found]

    def score(self, predictions: Sequence[Prediction], examples: Sequence[Example], form: Form) -> dict[str, float]:
        """Accuracy per word; F1 of whole entities where tags are B-, I- and O, else the mean over the labels."""
        labels = form.head.labels if form.head else ()
        found = [list(prediction.labels) for prediction in predictions if isinstance(prediction, Tags)]
        wanted = [[labels[i] for i in e.labels] for e in examples if isinstance(e, TaggedExample)]
        flat = [[label for row in rows for label in row] for rows in (found, wanted)]
        if all(label == "O" or label[:2] in ("B-", "I-") for label in labels):
            spans = [{(i, *span) for i, row in enumerate(rows) for span in entities(row)} for rows in (found, wanted)]
            total = sum(map(len, spans))
            f1 = 2 * len(spans[0] & spans[1]) / total if total else 1.0
        else:
            f1 = macro_f1(*flat)
        return {"accuracy": accuracy(*flat), "f1": f1}


def _places(examples: Sequence[Example]) -> Iterator[tuple[int, int]]:
    """Row and column of each word's first token, virtual tokens counted."""
    for row, example in enumerate(examples):
        if isinstance(example, TaggedExample):
            text = example.text
            yield from ((row, text[word]) for word in example.words)


def entities(tags: Sequence[str]) -> list[tuple[int, int, str]]:
    """First word, one past the last, and kind of each entity; an I- that continues nothing begins one."""
    found: list[tuple[int, int, str]] = []
    for i, tag in enumerate(tags):
        kind = tag[2:]
        if tag == "O":
            continue
        if tag.startswith("I-") and found and found[-1][1:] == (i, kind):
            found[-1] = (found[-1][0], i + 1, kind)
        else:
            found.append((i, i + 1, kind))
    return found


def _words(row: Mapping[str, Any]) -> list[str]:
    words = row.get("tokens")
    if not isinstance(words, list) or not words or not all(isinstance(w, str) and w.strip() == w != "" for w in words):
        raise DataError(
            expected="a list of words in 'tokens', without spaces around them",
            got="no 'tokens'" if words is None else short(words),
            do='write them as ["Ann", "lives", "in", "Rome"]',
        )
    return words


def _tags(row: Mapping[str, Any]) -> list[str]:
    tags = row.get("tags")
    if not isinstance(tags, list):
        raise DataError(
            expected="a list of labels in 'tags', one per token",
            got="no 'tags'" if tags is None else short(tags),
            do='write them as ["B-person", "O", "O", "B-place"]',
        )
    return [label_name(tag) for tag in tags]
