"""What a feature of the matrix is, and how its result is measured.

A feature runs a batch of rows through Overture and compares each with the plain model reading that row's words
(`bench.py` says how). The first line of a feature's docstring is its line in docs/compatibility.md.

Tolerances. In fp64, 1e-9 on logits of order 1 to 10: a few hundred roundings of 1e-16 with room, while a misplaced
position or a missing mask moves them by more than 0.01. Modeling code that computes in fp32 whatever its weights are
(routers, softmax, scans) is held to 2e-4, some hundred roundings of 1e-7 times the logits' size. `generate` hands out
its logits in fp32: 2e-5. Gradients are compared relative to their largest value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tests.matrix.bench import Bench, Row
from tests.matrix.families import Family

__all__ = ["ALL", "DECODERS", "ONE_STACK", "WRITERS", "Check", "Feature", "Group", "Measure", "Wider"]

ALL = ("decoder", "encoder", "encoder-decoder")
ONE_STACK = ("decoder", "encoder")
WRITERS = ("decoder", "encoder-decoder")
DECODERS = ("decoder",)


class Measure:
    """Compares, and remembers the largest deviation."""

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.largest = 0.0

    def close(self, got: Tensor, wanted: Tensor, *, at_least: float = 0.0) -> None:
        """`got` is `wanted` within the family's tolerance, or the wider one given."""
        allowed = max(self.tolerance, at_least)
        deviation = self.note(got.detach().double() - wanted.detach().double())
        assert deviation <= allowed, f"off by {deviation:.1e}, more than {allowed:.0e}"

    def note(self, difference: Tensor) -> float:
        """The largest difference, remembered."""
        deviation = float(difference.abs().max())
        assert deviation == deviation, "NaN"
        self.largest = max(self.largest, deviation)
        return deviation


Check = Callable[[Bench, Sequence[Row], Measure], None]


@dataclass(frozen=True, slots=True)
class Feature:
    """A column of the matrix."""

    name: str
    group: str
    """The table of the page that it is in."""
    kinds: tuple[str, ...]
    """Kinds of families that it applies to."""
    rows: str
    """`mixed` rows, or rows of one kind."""
    check: Check
    sliding: bool = False
    """It applies only to families with sliding windows."""
    bare: str = "none"
    """Rows that show whether the model itself can: without a prompt, or, for a gradient, with tokens in the input."""

    @property
    def slug(self) -> str:
        """The name as part of a test's id."""
        return self.name.lower().replace(" ", "-")

    @property
    def oracle(self) -> str:
        """What it is compared with, in a line."""
        return (self.check.__doc__ or "").split("\n")[0]

    def applies_to(self, family: Family) -> bool:
        """True if the feature means something for the family."""
        return family.kind in self.kinds and (family.sliding or not self.sliding)


class Group:
    """The features of one table of the page."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.features: list[Feature] = []

    def feature(
        self, name: str, kinds: tuple[str, ...] = ALL, rows: str = "mixed", **options: Any
    ) -> Callable[[Check], Check]:
        """Adds a check as a feature of this table."""

        def add(check: Check) -> Check:
            self.features.append(Feature(name, self.name, kinds, rows, check, **options))
            return check

        return add


class Wider(Measure):
    """A wider tolerance, noted in the same place."""

    def __init__(self, inner: Measure, tolerance: float) -> None:
        super().__init__(max(inner.tolerance, tolerance))
        self.inner = inner

    def close(self, got: Tensor, wanted: Tensor, *, at_least: float = 0.0) -> None:
        """As `Measure.close`."""
        super().close(got, wanted, at_least=at_least)
        self.inner.largest = max(self.inner.largest, self.largest)
