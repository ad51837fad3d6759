"""From results of tuning to the plain values that a report takes."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from overture.methods import Method
from overture.report import PromptSummary
from overture.tuning.config import TuneConfig
from overture.tuning.results import TuneResult

__all__ = ["Shortlist", "settings_of", "summary_of", "versions"]


class Shortlist:
    """Of a run of many, the prompts that a page has room for: those that gained least, which are worth a look.

    Args:
        room: how many, 1 or more.
    """

    def __init__(self, room: int = 100) -> None:
        self.room, self.count = room, 0
        self._kept: list[PromptSummary] = []

    def add(self, summary: PromptSummary) -> None:
        """Take one more into account."""
        self.count += 1
        self._kept.append(summary)
        if len(self._kept) >= 2 * self.room:  # so that a run of a million users keeps few of them
            self._kept = list(self.prompts)

    @property
    def prompts(self) -> tuple[PromptSummary, ...]:
        """Them, the one that gained least in front."""
        return tuple(sorted(self._kept, key=lambda one: (one.loss_before - one.loss_after, one.name))[: self.room])


def summary_of(
    result: TuneResult, *, file: str = "", score: tuple[float, float] | None = None, method: str | None = None
) -> PromptSummary:
    """One row of the report's table, with its curves."""
    return PromptSummary(
        name=result.name,
        method=method or result.method,
        virtual_tokens=result.prompt.length,
        trained_parameters=result.trained_parameters,
        stored_parameters=result.stored_parameters,
        base_parameters=result.base_parameters,
        loss_before=result.frozen_loss,
        loss_after=result.loss,
        seconds=result.seconds,
        train_curve=tuple(result.train_curve),
        dev_curve=tuple(result.dev_curve),
        score=score,
        file=file,
    )


def settings_of(method: Method | None, config: TuneConfig) -> dict[str, Any]:
    """Options of a method (if it was one for all) and of a run, in words."""
    described: dict[str, Any] = {} if method is None else method.describe()
    options = ({"method": described.pop("name")} if described else {}) | described | asdict(config)
    return {key.replace("_", " "): "default" if value is None else value for key, value in options.items()}


def versions() -> dict[str, str]:
    """Versions of what runs here."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    found |= {name: version(name) for name in ("overture", "torch", "transformers")}
    return found | {"cpu threads": str(os.cpu_count())}
