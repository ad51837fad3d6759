"""Question answering: the span of a context that answers a question.

A context without an answer has its span at the first special token. Virtual tokens are no place for a span.

Shape suffixes: B rows, T tokens.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from overture.errors import DataError, UnsupportedModelError
from overture.prompt import Head
from overture.runtime.chat import short
from overture.runtime.head_module import start_head
from overture.runtime.tokens import filler_id, leading_specials
from overture.runtime.whole import has_types
from overture.tuning.columns import target_column, text_of
from overture.tuning.data import Row
from overture.tuning.example import Example
from overture.tuning.forward import Trained, precise, run
from overture.tuning.predictions import Answer, Prediction
from overture.tuning.spans import Span, located
from overture.tuning.tasks.base import Builder, Form, PredictingTask, refuse_template, refuse_words

__all__ = ["QuestionAnswering", "SpanExample"]

_LONGEST = 30
"""Longest answer in tokens that is predicted."""
_NOWHERE = (0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanExample(Example):
    """A question, a context, and where its answer stands."""

    span: tuple[int, int]
    """First and last of the row's text tokens that are the answer; the first token twice if there is none."""
    context: str
    """The context."""
    places: tuple[Span | None, ...]
    """For each text token its characters in the context; None outside it."""
    answers: tuple[str, ...]
    """Answers that are right; none if the context has none, or they are to be predicted."""


class QuestionAnswering(PredictingTask):
    """Where in a context the answer begins and ends."""

    name = "question-answering"

    def head(
        self, model: PreTrainedModel, form: Form, rows: Sequence[Row], words: Any, generator: Generator
    ) -> Head | None:
        """Two outputs, whatever the data."""
        refuse_words(self.name, words)
        return start_head(model, self.name, ("start", "end"), generator)

    def builder(self, rows: Sequence[Row], form: Form) -> Builder:
        """Rows with `question`, `context` and `answers`, as SQuAD has them."""
        refuse_template(self.name, form.template)
        for name in ("question", "context", *(["answers"] if form.answered else [])):
            target_column(rows, (name,))
        return lambda row: _example(form, row)

    def losses(
        self, model: PreTrainedModel, rows: Sequence[Trained], examples: Sequence[Example], filler: int
    ) -> Float[Tensor, " B"]:
        """Mean of the cross-entropies of the first and the last token of each row's answer, among the row's text."""
        losses = []
        for (start, end), example in zip(_logits(model, rows, examples, filler), examples, strict=True):
            assert isinstance(example, SpanExample)
            wanted = torch.tensor(example.span, device=start.device)
            losses.append(cross_entropy(torch.stack([start, end]), wanted))
        return torch.stack(losses)

    def predict(
        self, model: PreTrainedModel, rows: Sequence[Trained], examples: Sequence[Example], form: Form
    ) -> list[Prediction]:
        """The likeliest span of the context, or none where the tokenizer has a token to stand for that."""
        logits = _logits(model, rows, examples, filler_id(form.tokenizer))
        # Without a special token in front the first one is a word of the question, and stands for nothing.
        nowhere = bool(leading_specials(form.tokenizer))
        return [
            _best(start.log_softmax(0), end.log_softmax(0), example, nowhere)
            for (start, end), example in zip(logits, examples, strict=True)
            if isinstance(example, SpanExample)
        ]

    def score(self, predictions: Sequence[Prediction], examples: Sequence[Example], form: Form) -> dict[str, float]:
        """Exact match and F1 of the answers' words, as SQuAD counts them: the best over the right answers."""
        exact = overlap = 0.0
        for prediction, example in zip(predictions, examples, strict=True):
            assert isinstance(prediction, Answer)
            assert isinstance(example, SpanExample)
            right = [_plain(answer) for answer in example.answers or ("",)]
            exact += max(_plain(prediction.text) == answer for answer in right)
            overlap += max(_overlap(_plain(prediction.text), answer) for answer in right)
        return {"exact_match": exact / len(examples), "f1": overlap / len(examples)}


def _logits(
    model: PreTrainedModel, rows: Sequence[Trained], examples: Sequence[Example], filler: int
) -> list[tuple[Float[Tensor, " T"], Float[Tensor, " T"]]]:
    """Of each row the logits of its text tokens, to be the first and the last of the answer."""
    output = run(model, rows, examples, filler)
    if "start_logits" not in output or output.start_logits.ndim != 2:
        raise UnsupportedModelError(
            expected="a model that scores the first and the last token of an answer",
            got=type(model).__name__,
            do="load another model with AutoModelForQuestionAnswering",
        )
    start, end = precise(output.start_logits), precise(output.end_logits)
    return [(start[i, list(e.text)], end[i, list(e.text)]) for i, e in enumerate(examples)]


def _best(start: Float[Tensor, " T"], end: Float[Tensor, " T"], example: SpanExample, nowhere: bool) -> Answer:
    inside = torch.tensor([place is not None for place in example.places], device=start.device)
    scores = start[:, None] + end[None]
    allowed = torch.ones_like(scores, dtype=torch.bool).triu().tril(_LONGEST - 1) & inside[:, None] & inside[None]
    allowed[_NOWHERE] |= nowhere
    best = int(scores.masked_fill(~allowed, -torch.inf).argmax())
    first, last = divmod(best, len(start))
    opening, closing = example.places[first], example.places[last]
    text = "" if opening is None or closing is None else example.context[opening[0] : closing[1]]
    return Answer(text.strip(), float(scores[first, last].exp()))


def _example(form: Form, row: Mapping[str, Any]) -> SpanExample:
    question, context = (text_of(row, name) for name in ("question", "context"))
    encoded, sides, spans = located(form.tokenizer, question, context)
    places = tuple(span if side == 1 and span[0] < span[1] else None for side, span in zip(sides, spans, strict=True))
    answers = _answers(row, context) if form.answered else []
    span = _NOWHERE
    if answers:
        text, begin = answers[0]
        within = [i for i, p in enumerate(places) if p is not None and p[0] < begin + len(text) and begin < p[1]]
        if not within:
            raise DataError(expected="an answer with at least one token", got=repr(text), do="correct the answer")
        span = within[0], within[-1]
    elif form.answered and not leading_specials(form.tokenizer):
        raise DataError(
            expected="an answer in every context, as the tokenizer has no special token in front to stand for none",
            got="no answer",
            do="drop the row",
        )
    return SpanExample(
        ids=tuple(encoded["input_ids"]),
        types=tuple(encoded["token_type_ids"]) if has_types(form.tokenizer) else None,
        span=span,
        context=context,
        places=places,
        answers=tuple(text for text, _ in answers),
    )


def _answers(row: Mapping[str, Any], context: str) -> list[tuple[str, int]]:
    """Text and first character of every right answer."""
    given = row.get("answers")
    match given:
        case {"text": list(texts), "answer_start": list(starts)} if len(texts) == len(starts):
            pairs = list(zip(texts, starts, strict=True))
        case list() if all(isinstance(a, Mapping) and {"text", "answer_start"} <= a.keys() for a in given):
            pairs = [(answer["text"], answer["answer_start"]) for answer in given]
        case _:
            raise DataError(
                expected='answers such as {"text": ["Rome"], "answer_start": [17]}',
                got="no 'answers'" if given is None else short(given),
                do="give every answer its text and its first character, or empty lists for none",
            )
    for text, start in pairs:
        if not isinstance(text, str) or not isinstance(start, int) or not text or context[start:][: len(text)] != text:
            found = repr(context[start : start + len(str(text))]) if isinstance(start, int) else short(start)
            raise DataError(
                expected=f"the answer {short(text)} at character {short(start)} of the context",
                got=found,
                do="correct answer_start; it counts characters from 0",
            )
    return pairs


def _plain(text: str) -> list[str]:
    """Words in small letters, without punctuation and articles."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _overlap(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    return 2 * sum((Counter(found) & Counter(wanted)).values()) / (len(found) + len(wanted))
