"""G, the share of full fine-tuning's gain, with paired bootstrap intervals over rows and seeds.

Shape suffixes: B bootstrap replicates, S seeds, R test rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["REPLICATES", "Gain", "Interval", "Scores", "gains", "mean_difference", "mean_gain", "resampled"]

REPLICATES = 2000
# Standard errors of the gap.
_CLEAR = 4
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Scores:
    """What a method got on a task: `sums / counts`, higher is better, from every test row under every seed.

    A text's sums are minus its losses, and its counts its target tokens; a choice's sums are 1 where it is right, its
    counts 1.
    """

    sums_SR: Floats
    counts_R: Floats

    def means_S(self) -> Floats:
        """The score of each seed."""
        means: Floats = self.sums_SR.sum(1) / self.counts_R.sum()
        return means


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure, and where 95 % of the bootstrap's replicates of it lie."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True, slots=True)
class Gain:
    """G of a method on a task."""

    value: float
    replicates_B: Floats

    def interval(self) -> Interval:
        """With its interval."""
        return _interval(self.value, self.replicates_B)


def resampled(scores: Scores, rows_BR: Floats, seeds_BS: Floats) -> Floats:
    """The mean score over seeds in every replicate, [B].

    Args:
        scores: of one method.
        rows_BR: how often each row is drawn.
        seeds_BS: how often each seed is drawn.
    """
    by_seed_BS = rows_BR @ scores.sums_SR.T / (rows_BR @ scores.counts_R)[:, None]
    means: Floats = (by_seed_BS * seeds_BS).sum(1) / seeds_BS.sum(1)
    return means


def gains(task: str, methods: Mapping[str, Scores], *, frozen: str, full: str) -> dict[str, Gain] | None:
    """G of every method on one task; None if full fine-tuning is not clearly above the frozen backbone.

    Clearly: by four standard errors. Below that a replicate's gap may be close to zero, and G anything.

    Paired: a replicate draws the same rows for all methods, and the same seeds for all that have as many.

    Args:
        task: its name, which seeds the bootstrap.
        methods: scores by method.
        frozen: the method that is 0.
        full: the method that is 1.
    """
    random = np.random.default_rng(list(task.encode()))
    rows = len(methods[full].counts_R)
    rows_BR = random.multinomial(rows, [1 / rows] * rows, size=REPLICATES).astype(float)
    drawn = {
        seeds: random.multinomial(seeds, [1 / seeds] * seeds, size=REPLICATES).astype(float)
        for seeds in sorted({len(scores.sums_SR) for scores in methods.values()})
    }
    replicates = {name: resampled(scores, rows_BR, drawn[len(scores.sums_SR)]) for name, scores in methods.items()}
    means = {name: float(scores.means_S().mean()) for name, scores in methods.items()}
    gap_B = replicates[full] - replicates[frozen]
    gap = means[full] - means[frozen]
    if gap <= _CLEAR * gap_B.std():
        return None
    return {
        name: Gain((means[name] - means[frozen]) / gap, (replicates[name] - replicates[frozen]) / gap_B)
        for name in methods
    }


def mean_gain(gains: Sequence[Gain]) -> Interval:
    """The mean of G over tasks; replicates of different tasks are independent."""
    mean_B = np.mean([gain.replicates_B for gain in gains], axis=0)
    return _interval(float(np.mean([gain.value for gain in gains])), mean_B)


def mean_difference(gains: Sequence[Gain], others: Sequence[Gain]) -> Interval:
    """How much higher the mean G of one method is than another's on the same tasks, paired."""
    pairs = list(zip(gains, others, strict=True))
    difference_B = np.mean([a.replicates_B - b.replicates_B for a, b in pairs], axis=0)
    return _interval(float(np.mean([a.value - b.value for a, b in pairs])), difference_B)


def _interval(value: float, replicates_B: Floats) -> Interval:
    low, high = np.quantile(replicates_B, [0.025, 0.975])
    return Interval(value, float(low), float(high))
