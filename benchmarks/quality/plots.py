"""The page's three plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.quality.findings import FROZEN, FULL, Found

__all__ = ["curves", "gain_by_rate", "gain_by_task"]

_COLOURS = {
    "prefix": "tab:blue",
    "prompt": "tab:green",
    "p-tuning": "tab:orange",
    "lora": "tab:gray",
    "full": "black",
    "head": "tab:brown",
}


def _style(method: str) -> dict[str, str]:
    side, kind = method.split(" ")
    return {
        "color": _COLOURS[kind],
        "linestyle": "--" if side == "peft" else "-",
        "marker": "x" if side == "peft" else "o",
    }


def _legend(figure: Figure, axes: Axes) -> None:
    """One for all, above the axes."""
    handles, names = axes.get_legend_handles_labels()
    columns = min(len(names), max(2, int(figure.get_figwidth() / 1.2)))
    figure.legend(handles, names, loc="outside upper center", ncols=columns, fontsize=7, frameon=False)


def gain_by_task(tasks: Sequence[Found], path: Path) -> None:
    """G of every method on every task, with intervals."""
    shown = [one for one in tasks if one.gains]
    figure = Figure(figsize=(min(max(6.0, 1.6 * len(shown) + 2), 15.0), 4.2), layout="constrained")
    axes: Axes = figure.add_subplot()
    methods = [m for m in dict.fromkeys(m for one in shown for m in one.runs) if m not in (FROZEN, FULL)]
    for place, method in enumerate(methods):
        points = [(x, one.gains[method].interval()) for x, one in enumerate(shown) if one.gains and method in one.gains]
        offset = 0.8 * (place / max(len(methods) - 1, 1) - 0.5)
        style = _style(method)
        axes.errorbar(
            [x + offset for x, _ in points],
            [i.value for _, i in points],
            yerr=[[max(i.value - i.low, 0) for _, i in points], [max(i.high - i.value, 0) for _, i in points]],
            fmt=style["marker"],
            color=style["color"],
            markersize=4,
            linewidth=1,
            label=method,
        )
    for level, name in ((0.0, "frozen"), (1.0, "full fine-tuning")):
        axes.axhline(level, color="0.6", linewidth=0.8, linestyle=":")
        axes.text(-0.48, level + 0.02, name, fontsize=7, color="0.4")
    axes.set_xticks(range(len(shown)), [one.task.name for one in shown], fontsize=8)
    axes.set_ylabel("G")
    axes.set_xlim(-0.5, len(shown) - 0.5)
    axes.set_ylim(-0.5, 1.6)
    _legend(figure, axes)
    figure.savefig(path, dpi=120)


def curves(tasks: Sequence[Found], path: Path) -> None:
    """Dev loss against steps, means over seeds."""
    shown = [one for one in tasks if FULL in one.runs][:6]
    figure = Figure(figsize=(3.6 * min(len(shown), 3), 3.0 * -(-len(shown) // 3)), layout="constrained")
    for place, one in enumerate(shown):
        axes = figure.add_subplot(-(-len(shown) // 3), min(len(shown), 3), place + 1)
        for method, runs in one.runs.items():
            if method == FROZEN:
                continue
            steps = [step for step, _ in runs[0].curve]
            losses = [[loss for _, loss in run.curve] for run in runs]
            means = [sum(column) / len(column) for column in zip(*losses, strict=True)]
            axes.plot(steps, means, label=method, markersize=3, linewidth=1, **_style(method))
        axes.set_title(one.task.name, fontsize=9)
        axes.set_xlabel("steps", fontsize=8)
        axes.set_ylabel("dev loss", fontsize=8)
        axes.tick_params(labelsize=7)
        if place == 0:
            _legend(figure, axes)
    figure.savefig(path, dpi=120)


def gain_by_rate(rates: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], path: Path) -> None:
    """G against the step size, as a multiple of the smallest that was tried.

    Args:
        rates: (rate, G) by method, by task.
        path: where the picture goes.
    """
    figure = Figure(figsize=(4.4 * max(len(rates), 1), 3.4), layout="constrained")
    for place, (task, methods) in enumerate(rates.items()):
        axes = figure.add_subplot(1, len(rates), place + 1)
        for method, points in methods.items():
            least = points[0][0]
            axes.plot(
                [r / least for r, _ in points], [g for _, g in points], label=method, markersize=3, **_style(method)
            )
        axes.set_xscale("log")
        axes.set_ylim(bottom=max(-0.5, min(0.0, *(g for points in methods.values() for _, g in points))))
        axes.set_title(task, fontsize=9)
        axes.set_xlabel("step size / smallest tried", fontsize=8)
        axes.set_ylabel("G", fontsize=8)
        if place == 0:
            _legend(figure, axes)
    figure.savefig(path, dpi=120)
