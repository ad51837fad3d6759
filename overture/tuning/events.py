"""What a run tells whoever listens: `on_event` gets one of these at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from overture.errors import OvertureError

__all__ = ["CheckpointSaved", "Evaluated", "Event", "Failed", "Finished", "Listener", "StepDone"]


@dataclass(frozen=True, slots=True)
class StepDone:
    """One optimizer step of every prompt still in training."""

    step: int
    """Steps done, from 1."""
    total_steps: int
    """Steps the run will take at most."""
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
    """One prompt is done."""

    name: str
    reason: str
    """`"steps"` or `"early stop"`."""
    step: int


@dataclass(frozen=True, slots=True)
class Failed:
    """One prompt stopped on an error; the others go on."""

    name: str
    error: OvertureError


@dataclass(frozen=True, slots=True)
class CheckpointSaved:
    """The run can be resumed from here."""

    step: int
    path: Path


Event = StepDone | Evaluated | Finished | Failed | CheckpointSaved
Listener = Callable[[Event], None]
