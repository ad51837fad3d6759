"""What a run returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
    """Wall time from the prompt's first step to its last, shared with the prompts that trained beside it."""
    stop_reason: str
    """`"steps"` or `"early stop"`."""


class CohortResult(dict[str, TuneResult]):
    """The results of many prompts by name, with the errors of those that failed.

    Results that were handed over as they came (`on_result`) are not in it.
    """

    failures: dict[str, OvertureError]
    """Errors by the name of the prompt that failed."""
    finished: tuple[str, ...]
    """Names of all prompts that the run has finished, those handed over included."""

    def __init__(
        self, results: Mapping[str, TuneResult], failures: Mapping[str, OvertureError], finished: Iterable[str]
    ) -> None:
        super().__init__(results)
        self.failures, self.finished = dict(failures), tuple(finished)
