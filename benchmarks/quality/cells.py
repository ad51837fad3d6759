"""Cells: one trained prompt or model each, as lines of a file that runs add to and reports read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "Cell", "Result", "add", "of", "read"]

RESULTS = Path(__file__).parents[2] / "docs" / "benchmarks" / "quality"
"""Where the results of each backbone lie, beside the page."""


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """What is trained. Two cells that are equal are one."""

    backbone: str
    task: str
    side: str
    """`ours`, `peft`, or `model` for what has no prompt."""
    kind: str
    option: str
    rate: float
    seed: int
    steps: int

    @property
    def method(self) -> str:
        """Side and kind, as the page names them."""
        return f"{self.side} {self.kind}"


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a cell."""

    cell: Cell
    base: str
    """Digest of the backbone's weights."""
    curve: list[tuple[int, float]] = field(default_factory=list)
    """(step, dev loss)."""
    clock: list[tuple[int, float]] = field(default_factory=list)
    """(step, seconds of training until then)."""
    trained: int = 0
    stored: int = 0
    scores: dict[str, Any] = field(default_factory=dict)
    """What `measure.measured` found on the test rows."""

    @property
    def dev_loss(self) -> float:
        """The best of the evaluations."""
        return min((loss for _, loss in self.curve), default=float("inf"))


def add(path: Path, result: Result) -> None:
    """Write a result behind the others, as one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cell = {name: getattr(result.cell, name) for name in Cell.__slots__}
    rest = {name: getattr(result, name) for name in Result.__slots__ if name != "cell"}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(cell | rest) + "\n")


def read(path: Path, base: str | None = None) -> dict[Cell, Result]:
    """Results by cell; of one base model's weights, or of all. A line that a kill cut short is passed over."""
    found: dict[Cell, Result] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue
        cell = Cell(**{name: values.pop(name) for name in Cell.__slots__})
        for name in ("curve", "clock"):
            values[name] = [(step, value) for step, value in values[name]]
        if base in (None, values["base"]):
            found[cell] = Result(cell, **values)
    return found


def of(results: Iterable[Result], **wanted: object) -> list[Result]:
    """Those whose cells have these values."""
    return [r for r in results if all(getattr(r.cell, name) == value for name, value in wanted.items())]
