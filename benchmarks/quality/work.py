"""From a cell to its result."""

from __future__ import annotations

from pathlib import Path

from benchmarks.quality import ours, peers
from benchmarks.quality.backbones import loaded
from benchmarks.quality.cells import Cell, Result
from benchmarks.quality.fit import Budget, Fit
from benchmarks.quality.measure import measured
from benchmarks.quality.tasks import TASKS, Task
from overture.errors import DivergedError

__all__ = ["result_of"]


def result_of(cell: Cell, base: str, data: Path) -> Result:
    """Train what the cell says, and measure it on the test rows. What diverges has no curve and no scores."""
    task = TASKS[cell.task](data)
    try:
        fit = _fitted(cell, task)
    except DivergedError:
        return Result(cell, base)
    scores = measured(cell.backbone, task, fit)
    curve = [(step, round(loss, 4)) for step, loss in fit.curve]
    return Result(cell, base, curve, fit.clock, fit.trained, fit.stored, scores)


def _fitted(cell: Cell, task: Task) -> Fit:
    if cell.kind == "frozen":
        model, tokenizer = loaded(cell.backbone, task, cell.seed)
        return Fit(model, tokenizer)
    side = ours.tuned if cell.side == "ours" else peers.trained
    return side(cell.backbone, task, cell.kind, cell.option, cell.rate, cell.seed, Budget(cell.steps))
