"""One picture of ratios: a bar each, a line at 1, and a mark where the target stands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

__all__ = ["Bar", "draw"]


class Bar(NamedTuple):
    """One ratio."""

    label: str
    value: float
    target: float | None = None
    """What was to be reached; None if nothing was set."""


def draw(bars: Sequence[Bar], axis: str, path: Path) -> list[str]:
    """Draw bars from top to bottom into a PNG, and give the lines of a page that show it.

    Args:
        bars: the ratios.
        axis: what they are ratios of.
        path: the picture's file.
    """
    figure = Figure(figsize=(8, 0.8 + 0.42 * len(bars)), layout="constrained")
    axes = figure.subplots()
    places, marked = range(len(bars)), [(i, bar.target) for i, bar in enumerate(bars) if bar.target is not None]
    drawn = axes.barh(list(places), [bar.value for bar in bars], height=0.6, color="#4c78a8")
    axes.bar_label(drawn, fmt="%.2f", label_type="center", color="white")  # at its end a target may stand
    axes.plot(
        [t for _, t in marked], [i for i, _ in marked], "|", color="#e45756", markersize=16, mew=2, label="target"
    )
    axes.axvline(1, color="gray", linewidth=0.8)
    axes.set_yticks(list(places), [bar.label for bar in bars])
    axes.invert_yaxis()
    axes.set_xlabel(axis)
    axes.spines[["top", "right"]].set_visible(False)
    if marked:
        figure.legend(loc="outside upper right", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return [f"![{axis}]({path.name})", ""]
