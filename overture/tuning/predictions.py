"""What a model with a prompt answers to one row, by task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Answer", "Label", "Prediction", "Tags"]


@dataclass(frozen=True, slots=True)
class Label:
    """The class of a text, or the word at a mask."""

    label: str
    """The likeliest label."""
    probabilities: Mapping[str, float]
    """Of every label, summing to 1; where a label is any word of the vocabulary, of the likeliest few."""


@dataclass(frozen=True, slots=True)
class Tags:
    """The classes of a text's words."""

    labels: tuple[str, ...]
    """The likeliest label of each word."""
    probabilities: tuple[float, ...]
    """Of these labels."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A span of the context, or a text that was written."""

    text: str
    """The answer; empty if the context has none."""
    probability: float | None
    """Of the span among all spans; None for a text that was written."""


Prediction = Label | Tags | Answer
