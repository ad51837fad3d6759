"""Pictures with matplotlib's object interface: no global state, no display."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from os import PathLike

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from overture.files import write_atomically

__all__ = ["Curve", "heatmap_png", "loss_svg"]

Curve = Sequence[tuple[int, float]]
"""(step, loss) pairs in order."""

# Colours that stand for CSS variables of the page, so that one drawing serves light and dark.
_INK, _GRID, _TRAIN, _DEV = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"
_VARIABLES = {_INK: "var(--soft)", _GRID: "var(--line)", _TRAIN: "var(--train)", _DEV: "var(--accent)"}


def loss_svg(train: Curve, dev: Curve, *, frozen: float) -> str:
    """A small chart of one prompt's losses as inline SVG, coloured by the page's CSS variables.

    Args:
        train: training loss by step.
        dev: dev loss by step.
        frozen: dev loss of the frozen model, drawn as a dashed line.

    Returns:
        An `<svg>` element without any text from outside. The same numbers give the same bytes.
    """
    salt = hashlib.sha256(repr((tuple(train), tuple(dev), frozen)).encode()).hexdigest()[:12]
    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none", "font.size": 8.0}):
        figure = Figure(figsize=(3.4, 2.0), layout="constrained", facecolor="none")
        axes = figure.add_subplot(facecolor="none")
        _frame(axes)
        axes.plot(*_columns(train), color=_TRAIN, linewidth=1.0)
        axes.plot(*_columns(dev), color=_DEV, linewidth=1.8, marker="o", markersize=2.6)
        axes.axhline(frozen, color=_INK, linewidth=1.0, linestyle=(0, (4, 3)))
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return _inline(out.getvalue())


def heatmap_png(
    rows: Sequence[Sequence[float]], path: str | PathLike[str], *, title: str, row_label: str, column_label: str
) -> None:
    """Write a heatmap with every cell's number in it.

    Args:
        rows: values from 0 to 1; rows may differ in length (layers may differ in heads).
        path: PNG file to write.
        title: headline.
        row_label: what a row is.
        column_label: what a column is.

    Raises:
        OvertureError: the folder is missing or cannot be written.
    """
    width = max(map(len, rows))
    padded = [[*row, *([float("nan")] * (width - len(row)))] for row in rows]
    size = (max(5.0, 1.6 + 0.55 * width), 1.6 + 0.42 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(padded, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_title(title, parse_math=False, loc="left", fontsize=10)
    axes.set_xlabel(column_label)
    axes.set_ylabel(row_label)
    # A number for every head and layer where they fit, else every fourth.
    axes.set_xticks(range(0, width, 1 if width <= 24 else 4))
    axes.set_yticks(range(0, len(rows), 1 if len(rows) <= 48 else 4))
    if width <= 24:
        _numbers(axes, rows)
    figure.colorbar(image, ax=axes, label="share of attention on the prompt")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=144)
    write_atomically(path, out.getvalue())


def _numbers(axes: Axes, rows: Sequence[Sequence[float]]) -> None:
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            colour = "black" if value > 0.6 else "white"
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=7)


def _columns(curve: Curve) -> tuple[list[int], list[float]]:
    return [step for step, _ in curve], [loss for _, loss in curve]


def _frame(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GRID)
    axes.tick_params(colors=_INK, length=0)
    axes.grid(visible=True, color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))


def _inline(svg: str) -> str:
    """The bare element: no XML header, no global style, no fixed size, colours by name."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<style.*?</style>|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<svg [^>]*?(viewBox=\"[^\"]+\")[^>]*>", r'<svg xmlns="http://www.w3.org/2000/svg" \1>', svg, count=1)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg
