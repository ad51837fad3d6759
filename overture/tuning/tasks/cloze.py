"""Cloze questions: a masked language model says a label with a word at the mask.

With a verbalizer every label has its words, and the loss is over the labels alone. Without one the label is itself the
word, and the loss is over the vocabulary.

Shape suffixes: B rows, N rows of one choice, V vocabulary, C labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from overture.errors import ConfigError, DataError
from overture.prompt import Head
from overture.runtime.fill import has_text
from overture.runtime.tokens import filler_id, text_ids
from overture.runtime.whole import encode_whole
from overture.tuning.columns import require_columns, target_column
from overture.tuning.data import Row
from overture.tuning.example import Example
from overture.tuning.forward import Trained, selected_logits
from overture.tuning.labels import label_name, position_of
from overture.tuning.predictions import Label, Prediction
from overture.tuning.tasks.base import Builder, Form, PredictingTask
from overture.tuning.tasks.sequence import UNKNOWN, label_score, labelled
from overture.tuning.truncate import text_right

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ClozeExample", "MaskedLM"]

_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ClozeExample(Example):
    """A text with one mask, and what stands there."""

    mask: int
    """Which of the row's text tokens is the mask."""
    choices: tuple[tuple[int, ...], ...]
    """For every label the ids of its words; empty if any word of the vocabulary may stand there."""
    label: int
    """Index of the label, or the id of the word; -1 if it is to be predicted."""


class MaskedLM(PredictingTask):
    """A word at the mask."""

    name = "masked-lm"

    def head(
        self, model: PreTrainedModel, form: Form, rows: Sequence[Row], words: Any, generator: Generator
    ) -> Head | None:
        """The verbalizer, if there is one."""
        target_column(rows, ("label",))
        found = labelled(rows)
        if words is None:
            return None
        listed = {str(label): (some,) if isinstance(some, str) else tuple(some) for label, some in words.items()}
        missing = sorted(set(found) - set(listed))
        if missing:
            raise ConfigError(
                expected="a verbalizer with words for every label of the data",
                got=f"none for {', '.join(map(repr, missing[:4]))}",
                do="add the label to the verbalizer, or correct it in the data",
            )
        for label, some in listed.items():
            for word in some:
                _word_id(form.tokenizer, word, f"the label {label!r}")
        return Head(self.name, tuple(listed), words=tuple(listed.values()))

    def builder(self, rows: Sequence[Row], form: Form) -> Builder:
        """Rows with `text` that holds the mask token, or the columns of a template with `{mask}`; and `label`."""
        template, tokenizer, head = form.template, form.tokenizer, form.head
        if has_text(template):
            require_columns(rows, template)
        if form.answered:
            target_column(rows, ("label",))
        spelled = [(label, some) for label, some in zip(head.labels, head.words or (), strict=True)] if head else []
        choices = tuple(
            tuple(dict.fromkeys(_word_id(tokenizer, word, f"the label {label!r}") for word in some))
            for label, some in spelled
        )

        def build(row: Mapping[str, Any]) -> ClozeExample:
            read = encode_whole(tokenizer, row, template)
            masks = [i for i, at in enumerate(read.text) if read.ids[at] == tokenizer.mask_token_id]
            if len(masks) != 1:
                raise DataError(
                    expected=f"one mask in every row: {{mask}} in the template, or {tokenizer.mask_token} in the text",
                    got=f"{len(masks)} of them",
                    do="write the mask where the label's word shall stand",
                )
            label = UNKNOWN
            if form.answered:
                name = label_name(row.get("label"))
                label = position_of(name, head.labels) if head else _word_id(tokenizer, name, "the column 'label'")
            return ClozeExample(
                ids=read.ids, slots=read.slots, types=read.types, mask=masks[0], choices=choices, label=label
            )

        return build

    def shortened(self, example: Example, form: Form, max_tokens: int) -> Example:
        """The text loses its right side, if the mask is not there."""
        assert isinstance(example, ClozeExample)
        cut: ClozeExample = text_right(example, form.tokenizer, max_tokens)
        if form.tokenizer.mask_token_id not in cut.ids:
            raise DataError(
                expected=f"at most {max_tokens} tokens",
                got=f"{len(example)}, and the mask among those to cut",
                do="shorten the row, or write the mask in front of the text",
            )
        return cut

    def losses(
        self, model: PreTrainedModel, rows: Sequence[Trained], examples: Sequence[Example], filler: int
    ) -> Float[Tensor, " B"]:
        """Cross-entropy of the label among the labels, or of the word among the vocabulary."""
        losses: dict[int, Tensor] = {}
        for scores, group in _scored(model, rows, examples, filler):
            wanted = torch.tensor([example.label for _, example in group], device=scores.device)
            rated = cross_entropy(scores, wanted, reduction="none")
            losses |= {place: loss for (place, _), loss in zip(group, rated, strict=True)}
        return torch.stack([losses[place] for place in range(len(examples))])

    def predict(
        self, model: PreTrainedModel, rows: Sequence[Trained], examples: Sequence[Example], form: Form
    ) -> list[Prediction]:
        """The likeliest label, or the likeliest words."""
        found: dict[int, Prediction] = {}
        for scores, group in _scored(model, rows, examples, filler_id(form.tokenizer)):
            for (place, _), shares in zip(group, scores.softmax(-1), strict=True):
                head = rows[place].head
                best = shares.topk(min(_SHOWN, len(shares))).indices.tolist() if head is None else range(len(shares))
                names = [_word(form, i) for i in best] if head is None else list(head.labels)
                named: dict[str, float] = {}
                for name, share in zip(names, shares[list(best)].tolist(), strict=True):
                    named[name] = named.get(name, 0.0) + share  # two tokens may be one word
                found[place] = Label(max(named, key=named.__getitem__), named)
        return [found[place] for place in range(len(examples))]

    def score(self, predictions: Sequence[Prediction], examples: Sequence[Example], form: Form) -> dict[str, float]:
        """Accuracy, and F1 as the mean over the labels."""
        labels = [example.label for example in examples if isinstance(example, ClozeExample)]
        wanted = [form.head.labels[i] if form.head else _word(form, i) for i in labels]
        return label_score(predictions, wanted)


Group = list[tuple[int, ClozeExample]]


def _scored(
    model: PreTrainedModel, rows: Sequence[Trained], examples: Sequence[Example], filler: int
) -> list[tuple[Float[Tensor, "_N _C"], Group]]:
    """The scores of the labels at each row's mask, rows that choose among the same words together.

    A label is as likely as all its words together.
    """
    cloze = [example for example in examples if isinstance(example, ClozeExample)]
    places = [(row, example.text[example.mask]) for row, example in enumerate(cloze)]
    logits = selected_logits(model, rows, examples, filler, places)
    groups: dict[tuple[tuple[int, ...], ...], Group] = {}
    for row, example in enumerate(cloze):
        groups.setdefault(example.choices, []).append((row, example))
    scored: list[tuple[Float[Tensor, "_N _C"], Group]] = []
    for choices, group in groups.items():
        own = logits[[row for row, _ in group]]
        labels = [own[:, list(ids)].logsumexp(-1) for ids in choices]
        scored.append((torch.stack(labels, dim=-1) if choices else own, group))
    return scored


def _word(form: Form, token: int) -> str:
    return str(form.tokenizer.decode([token])).strip()


def _word_id(tokenizer: PreTrainedTokenizerBase, word: str, where: str) -> int:
    """The one token of a word, as it stands behind a space if the tokenizer tells that from the word alone.

    Raises:
        DataError: it has several, or is unknown.
    """
    spelled = [text_ids(tokenizer, text) for text in (f" {word}", word)]
    for ids in spelled:
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            return ids[0]
    ids = spelled[-1]
    raise DataError(
        expected=f"words of one token in {where}, since one mask stands for one token",
        got=f"{word!r}, which has {len(ids)}{' and is unknown' if ids == [tokenizer.unk_token_id] else ''}",
        do="choose another word, such as a shorter or more frequent one",
    )
