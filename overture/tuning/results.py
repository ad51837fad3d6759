"""What a run returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from overture.errors import OvertureError
from overture.prompt import SoftPrompt

__all__ = ["CohortResult", "TuneResult"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneResult:
    """One tuned prompt and how it went."""

    name: str
    """The prompt's name."""
    prompt: SoftPrompt
    """The tuned prompt; with a dev split, as it was when its dev loss was lowest."""
    method: str
    """The method's name."""
    trained_parameters: int
    """Parameters that training changed, the throw-away network included."""
    stored_parameters: int
    """Numbers in the saved prompt."""
    base_parameters: int
    """Parameters of the frozen model."""
    unit: str
    """What a loss is per: a target token, a word, or a row."""
    frozen_loss: float
    """Loss of the frozen model per target, nats, on the dev split (on the training rows without one)."""
    loss: float
    """The same of the tuned prompt."""
    train_curve: tuple[tuple[int, float], ...]
    """(step, loss) of every step."""
    dev_curve: tuple[tuple[int, float], ...]
    """(step, loss) of every evaluation."""
    seconds: float
    """Wall time of the run, shared with the other prompts of the cohort."""
    stop_reason: str
    """`"steps"` or `"early stop"`."""


class CohortResult(dict[str, TuneResult]):
    """The results of many prompts by name, with the errors of those that failed."""

    def __init__(self, results: Mapping[str, TuneResult], failures: Mapping[str, OvertureError]) -> None:
        super().__init__(results)
        self.failures = dict(failures)
