"""What a run tells whoever listens: `on_event` gets one of these at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from overture.errors import OvertureError

__all__ = [
    "CheckpointSaved",
    "Evaluated",
    "Event",
    "Failed",
    "Finished",
    "Listener",
    "Planned",
    "Started",
    "StepDone",
    "Studied",
]


@dataclass(frozen=True, slots=True)
class Studied:
    """The base has asked and answered questions about one more part of a text."""

    parts: int
    """Parts that are done, from 1."""
    total: int
    """Parts there are."""
    rows: int
    """Rows that came of those that are done."""


@dataclass(frozen=True, slots=True)
class Planned:
    """What the run makes of its budget of memory."""

    slots: int
    """Prompts in training at once, if all are like the first; fewer while they hold more."""
    memory: int
    """The budget, bytes, beside what the frozen model takes."""
    held: int
    """Bytes that the first prompt holds for as long as it trains, its rows included."""
    passing: int
    """Bytes that a step of the first prompt takes for a while."""


@dataclass(frozen=True, slots=True)
class Started:
    """One prompt has a slot: its rows are read, and it trains from now on."""

    name: str
    step: int
    """Steps it has behind it: 0, or more if the run was resumed."""


@dataclass(frozen=True, slots=True)
class StepDone:
    """One optimizer step of every prompt in training."""

    step: int
    """Steps of the run, from 1. A prompt that joined later has taken fewer."""
    total_steps: int
    """Steps the run will take if no further prompt stops early or fails."""
    losses: Mapping[str, float]
    """Mean loss per target token (nats) by prompt."""
    tokens: int
    """Text tokens in this step's batches, padding not counted."""
    elapsed: float
    """Seconds since the run began or was resumed."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One prompt measured on its dev split."""

    name: str
    step: int
    loss: float
    """Mean loss per target token, nats."""
    best: bool
    """True if this is the prompt's lowest so far."""


@dataclass(frozen=True, slots=True)
class Finished:
    """One prompt is done, and its result has been handed over."""

    name: str
    reason: str
    """`"steps"` or `"early stop"`."""
    step: int


@dataclass(frozen=True, slots=True)
class Failed:
    """One prompt stopped on an error, or could not begin; the others go on."""

    name: str
    error: OvertureError


@dataclass(frozen=True, slots=True)
class CheckpointSaved:
    """The run can be resumed from here."""

    step: int
    path: Path


Event = Studied | Planned | Started | StepDone | Evaluated | Finished | Failed | CheckpointSaved
Listener = Callable[[Event], None]
