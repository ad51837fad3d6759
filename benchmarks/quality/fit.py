"""What training gives, and the clock that all sides are timed by."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from torch import nn

import overture as ov

__all__ = ["Budget", "Clock", "Fit"]


@dataclass(frozen=True, slots=True)
class Budget:
    """What every fit may spend."""

    steps: int
    batch_size: int = 8
    evaluations: int = 6
    """On the dev rows, evenly over the steps; the best of them is kept."""

    @property
    def eval_every(self) -> int:
        """Steps between evaluations."""
        return max(self.steps // self.evaluations, 1)


@dataclass(slots=True)
class Fit:
    """A trained prompt, or a trained model, as it was when its dev loss was lowest."""

    model: nn.Module
    """What answers: the frozen model, or the trained one."""
    tokenizer: Any
    prompt: ov.SoftPrompt | None = None
    """What stands before its rows."""
    curve: list[tuple[int, float]] = field(default_factory=list)
    """(step, dev loss)."""
    clock: list[tuple[int, float]] = field(default_factory=list)
    """(step, seconds of training until then, see `Clock`)."""
    trained: int = 0
    """Parameters that training changed, networks that are thrown away included."""
    stored: int = 0
    """Numbers to keep."""


class Clock:
    """Seconds of training, from the model's being there to each evaluation; what evaluations take is left out.

    Processor time of the whole process, which has one thread: what a clock on the wall shows if nothing else runs,
    whatever runs beside it. The start of a prompt (its words run through the model, a look at the model's shape)
    counts.
    """

    def __init__(self) -> None:
        self.seconds, self._from = 0.0, time.process_time()
        self.marks: list[tuple[int, float]] = []

    def pause(self) -> None:
        """Before an evaluation."""
        self.seconds += time.process_time() - self._from

    def go_on(self) -> None:
        """Behind it."""
        self._from = time.process_time()

    def mark(self, step: int) -> None:
        """Note the seconds at a step, while paused."""
        self.marks.append((step, round(self.seconds, 3)))
