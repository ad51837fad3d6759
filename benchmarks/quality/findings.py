"""From cells to figures: what the page's tables and plots show. Everything here is arithmetic on results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import numpy as np

from benchmarks.quality import plan
from benchmarks.quality.cells import Cell, Result, of
from benchmarks.quality.gain import Gain, Scores, gains
from benchmarks.quality.tasks import Task

__all__ = ["Found", "Spread", "ensemble", "found", "reached", "robustness", "scores_of", "steps_to"]

FROZEN, FULL = "model frozen", "model full"
Curve = Sequence[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Found:
    """One task, as far as its cells are there."""

    task: Task
    runs: Mapping[str, list[Result]]
    """By method, one for every seed, in the chosen setting."""
    gains: Mapping[str, Gain] | None
    """By method; None if full fine-tuning's gain is not clear, or its cells are missing."""

    def scores(self, method: str) -> list[float]:
        """The score of each seed."""
        return scores_of(self.task, self.runs[method]).means_S().tolist()


def scores_of(task: Task, runs: Sequence[Result]) -> Scores:
    """The test rows' scores of several seeds."""
    if task.labels:
        right = [
            [float(a == row["label"]) for a, row in zip(r.scores["answers"], task.test, strict=True)] for r in runs
        ]
        return Scores(np.array(right), np.ones(len(task.test)))
    return Scores(-np.array([r.scores["losses"] for r in runs]), np.array(runs[0].scores["targets"], dtype=float))


def found(backbone: str, task: Task, results: Mapping[Cell, Result]) -> Found:
    """What there is of a task. A method counts once all its seeds are there."""
    runs: dict[str, list[Result]] = {}
    untouched = [r for r in of(results.values(), task=task.name, kind="frozen") if r.scores]
    if untouched:
        runs[FROZEN] = untouched
    for side, kind in plan.METHODS[backbone]:
        chosen = plan.best(plan.trials(backbone, task.name, side, kind), results)
        if chosen is None:
            continue
        same = of(results.values(), task=task.name, side=side, kind=kind, option=chosen.option, rate=chosen.rate)
        by_seed = {r.cell.seed: r for r in same if r.scores and r.cell.seed in plan.SEEDS}
        if len(by_seed) == len(plan.SEEDS):
            runs[f"{side} {kind}"] = [by_seed[seed] for seed in plan.SEEDS]
    scores = {name: scores_of(task, some) for name, some in runs.items()}
    known = {FROZEN, FULL} <= set(scores)
    return Found(task, runs, gains(task.name, scores, frozen=FROZEN, full=FULL) if known else None)


@dataclass(frozen=True, slots=True)
class Spread:
    """Standard deviations of the score over seeds, in units of full fine-tuning's gain, a mean over tasks."""

    method: str
    tasks: int
    value: float


def spreads(all_found: Iterable[Found]) -> list[Spread]:
    """How much seeds differ, by method."""
    by_method: dict[str, list[float]] = {}
    for one in all_found:
        if one.gains is None:
            continue
        gap = mean(one.scores(FULL)) - mean(one.scores(FROZEN))
        for method in one.runs:
            if method != FROZEN:
                by_method.setdefault(method, []).append(stdev(one.scores(method)) / gap)
    return [Spread(method, len(values), mean(values)) for method, values in by_method.items()]


def reached(curve: Curve, loss: float) -> float | None:
    """The first step at which a curve is at or under a loss, between evaluations in a straight line; None if never."""
    before: tuple[int, float] | None = None
    for step, value in curve:
        if value <= loss:
            if before is None or before[1] == value:
                return float(step)
            share = (before[1] - loss) / (before[1] - value)
            return before[0] + share * (step - before[0])
        before = (step, value)
    return None


def seconds_at(clock: Curve, step: float) -> float:
    """Seconds of training at a step, between evaluations in a straight line."""
    steps, seconds = zip(*[(0, 0.0), *clock], strict=True)
    return float(np.interp(step, steps, seconds))


def steps_to(ours: Sequence[Result], theirs: Sequence[Result]) -> list[tuple[float | None, float, float | None, float]]:
    """By seed: our steps to the other's best dev loss, the other's steps to it, and the seconds of both."""
    pairs = []
    for own, other in zip(ours, theirs, strict=True):
        step = reached(own.curve, other.dev_loss)
        last = next(step for step, loss in other.curve if loss == other.dev_loss)
        seconds = None if step is None else seconds_at(own.clock, step)
        pairs.append((step, float(last), seconds, seconds_at(other.clock, last)))
    return pairs


def robustness(
    backbone: str, task: Task, side: str, kind: str, results: Mapping[Cell, Result]
) -> list[tuple[float, float]]:
    """(rate, G) of a method's trials on its trial task; empty if any is missing, or G has no meaning there."""
    cells = plan.trials(backbone, task.name, side, kind)
    one = found(backbone, task, results)
    if one.gains is None or any(cell not in results for cell in cells):
        return []
    low, high = mean(one.scores(FROZEN)), mean(one.scores(FULL))
    rows = []
    for cell in cells:
        result = results[cell]
        score = float(scores_of(task, [result]).means_S()[0]) if result.scores else low
        rows.append((cell.rate, (score - low) / (high - low)))
    return rows


def ensemble(task: Task, members: Sequence[Result]) -> tuple[list[float], float]:
    """Accuracy of each member, and of their majority vote; the earliest member's answer wins among equals."""
    answers = [result.scores["answers"] for result in members]
    voted = [max(column, key=column.count) for column in zip(*answers, strict=True)]
    right = [row["label"] for row in task.test]
    shares = [mean(float(a == label) for a, label in zip(some, right, strict=True)) for some in (*answers, voted)]
    return shares[:-1], shares[-1]
