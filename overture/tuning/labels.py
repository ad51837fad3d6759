"""Labels of rows, and how often predicted ones are right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedModel

from overture.errors import DataError
from overture.runtime.chat import short
from overture.runtime.heads import own_labels

__all__ = ["accuracy", "label_name", "label_names", "macro_f1", "position_of"]


def label_name(value: object) -> str:
    """A label as text: words as they are, a number in digits.

    Raises:
        DataError: it is neither.
    """
    if isinstance(value, str | int) and str(value):
        return str(value)
    raise DataError(
        expected="a label: a word, or a whole number",
        got="no 'label'" if value is None else short(value),
        do="write one label into every row",
    )


def label_names(found: Iterable[str], model: PreTrainedModel) -> tuple[str, ...]:
    """The labels of a run in the order of the outputs: the model's own if it has all, else those found, sorted.

    Raises:
        DataError: there is only one.
    """
    names, own = set(found), own_labels(model)
    if names <= set(own):
        return own
    if len(names) == 1:
        raise DataError(
            expected="rows of at least two labels, to tell them apart",
            got=f"the label {names.pop()!r} in every row",
            do="add rows with other labels",
        )
    return tuple(sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names))


def position_of(label: str, labels: Sequence[str]) -> int:
    """The place of a label among all.

    Raises:
        DataError: it is none of them.
    """
    if label not in labels:
        raise DataError(
            expected=f"one of the labels {', '.join(map(repr, labels[:8]))}{', ...' if len(labels) > 8 else ''}",
            got=repr(label),
            do="correct the label, or tune the prompt on rows that have it",
        )
    return list(labels).index(label)


def accuracy(found: Sequence[str], wanted: Sequence[str]) -> float:
    """Share of answers that are right."""
    return sum(f == w for f, w in zip(found, wanted, strict=True)) / len(wanted)


def macro_f1(found: Sequence[str], wanted: Sequence[str]) -> float:
    """Mean over the labels of the harmonic mean of precision and recall; labels that occur nowhere do not count."""
    scores = []
    for label in {*found, *wanted}:
        hits = sum(f == w == label for f, w in zip(found, wanted, strict=True))
        scores.append(2 * hits / (found.count(label) + wanted.count(label)))
    return sum(scores) / len(scores)
