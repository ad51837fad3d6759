"""Sequence classification: one label for a text, or for two.

Shape suffixes: B rows, C labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from overture.errors import DataError
from overture.prompt import Head
from overture.runtime.fill import has_text
from overture.runtime.head_module import start_head
from overture.runtime.heads import own_labels
from overture.runtime.tokens import filler_id
from overture.runtime.whole import encode_whole
from overture.tuning.columns import require_columns, target_column
from overture.tuning.data import BadRow, Row, raise_bad_rows
from overture.tuning.example import Example
from overture.tuning.forward import Trained, precise, run
from overture.tuning.labels import accuracy, label_name, label_names, macro_f1, position_of
from overture.tuning.predictions import Label, Prediction
from overture.tuning.tasks.base import Builder, Form, PredictingTask, refuse_words
from overture.tuning.truncate import text_right

__all__ = ["UNKNOWN", "LabelledExample", "SequenceClassification", "chosen", "label_score", "labelled"]

UNKNOWN = -1
"""The place of a label that is to be predicted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledExample(Example):
    """A text and its label."""

    label: int
    """Index of the label; -1 if it is to be predicted."""


class SequenceClassification(PredictingTask):
    """A label for a whole text."""

    name = "sequence-classification"

    def head(
        self, model: PreTrainedModel, form: Form, rows: Sequence[Row], words: Any, generator: Generator
    ) -> Head | None:
        """The model's own labels, or the data's."""
        refuse_words(self.name, words)
        target_column(rows, ("label",))
        found = labelled(rows)
        return start_head(model, self.name, label_names(found, model), generator)

    def builder(self, rows: Sequence[Row], form: Form) -> Builder:
        """Rows with `text`, perhaps `text_pair`, and `label`; or with a template: its columns and `label`."""
        template, labels = form.template, form.head.labels if form.head else ()
        if has_text(template):
            require_columns(rows, template)
        if form.answered:
            target_column(rows, ("label",))

        def build(row: Mapping[str, Any]) -> LabelledExample:
            read = encode_whole(form.tokenizer, row, template)
            label = position_of(label_name(row.get("label")), labels) if form.answered else UNKNOWN
            return LabelledExample(ids=read.ids, slots=read.slots, types=read.types, label=label)

        return build

    def shortened(self, example: Example, form: Form, max_tokens: int) -> Example:
        """The text loses its right side; special tokens around it and virtual tokens stay."""
        return text_right(example, form.tokenizer, max_tokens)

    def losses(
        self, model: PreTrainedModel, rows: Sequence[Trained], examples: Sequence[Example], filler: int
    ) -> Float[Tensor, " B"]:
        """Cross-entropy of each row's label."""
        logits = precise(run(model, rows, examples, filler).logits)
        wanted = torch.tensor([e.label for e in examples if isinstance(e, LabelledExample)], device=logits.device)
        return cross_entropy(logits, wanted, reduction="none")

    def predict(
        self, model: PreTrainedModel, rows: Sequence[Trained], examples: Sequence[Example], form: Form
    ) -> list[Prediction]:
        """The likeliest label, and how likely each is."""
        logits = precise(run(model, rows, examples, filler_id(form.tokenizer)).logits)
        return [chosen(row.softmax(-1), trained, model) for row, trained in zip(logits, rows, strict=True)]

    def score(self, predictions: Sequence[Prediction], examples: Sequence[Example], form: Form) -> dict[str, float]:
        """Accuracy, and F1 as the mean over the labels."""
        labels = form.head.labels if form.head else ()
        wanted = [labels[example.label] for example in examples if isinstance(example, LabelledExample)]
        return label_score(predictions, wanted)


def labelled(rows: Sequence[Row]) -> list[str]:
    """The label of every row.

    Raises:
        DataError: rows without one; each is named.
    """
    found: list[str] = []
    bad: list[BadRow] = []
    for row in rows:
        try:
            found.append(label_name(row.values.get("label")))
        except DataError as error:
            bad.append((row.where, error))
    raise_bad_rows(bad)
    return found


def chosen(probabilities: Float[Tensor, " C"], trained: Trained, model: PreTrainedModel) -> Label:
    """The likeliest label of one row; a batch may be wider than the row's own labels."""
    labels = own_labels(model) if trained.head is None else trained.head.labels
    named = dict(zip(labels, probabilities.tolist(), strict=False))
    return Label(max(named, key=named.__getitem__), named)


def label_score(predictions: Sequence[Prediction], wanted: Sequence[str]) -> dict[str, float]:
    """Accuracy, and F1 as the mean over the labels."""
    found = [prediction.label for prediction in predictions if isinstance(prediction, Label)]
    return {"accuracy": accuracy(found, wanted), "f1": macro_f1(found, wanted)}
