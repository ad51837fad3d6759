"""Live progress of a tuning run: one line for one prompt, a table for a cohort; sparse lines where nobody looks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from overture.cli._ui import Ui
from overture.tuning.events import CheckpointSaved, Evaluated, Event, Failed, Finished, Planned, Started, StepDone

__all__ = ["TuningView", "sparkline"]

_BLOCKS = "▁▂▃▄▅▆▇█"
_CURVE = 24
_SPARSE = 10


@dataclass
class _Line:
    """What is known of one prompt."""

    method: str
    losses: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    state: str = "waiting"


class TuningView:
    """Shows the events of `tune` and `tune_many`; pass it as `on_event`.

    Args:
        ui: the screen.
        methods: method by the name of each prompt.
    """

    def __init__(self, ui: Ui, methods: Mapping[str, str]) -> None:
        self.ui = ui
        self.lines = {name: _Line(method) for name, method in methods.items()}
        self.done = self.total = 0
        self.first: tuple[int, float] | None = None
        self.tokens = 0
        self.elapsed = 0.0
        self.said = 0
        self.pending: str | None = None
        self.live = Live(console=ui.err, transient=True, refresh_per_second=8, get_renderable=self._render)

    def __enter__(self) -> TuningView:
        if self.ui.live:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._say()
        self.live.stop()

    def __call__(self, event: Event) -> None:
        """Take in one event."""
        match event:
            case StepDone():
                self._step(event)
            case Evaluated():
                self.lines[event.name].held_out.append(event.loss)
            case Finished():
                self.lines[event.name].state = event.reason
            case Failed():
                self.lines[event.name].state = "failed"
            case CheckpointSaved() | Planned() | Started():
                pass

    def _step(self, event: StepDone) -> None:
        self._say()
        if self.first is None:
            # The first step also warms up, so speed and time left are counted from its end.
            self.first = (event.step, event.elapsed)
        else:
            self.tokens += event.tokens
        self.done, self.total, self.elapsed = event.step, event.total_steps, event.elapsed
        for name, loss in event.losses.items():
            self.lines[name].losses.append(loss)
            self.lines[name].state = "tuning"
        tenth = self.done * _SPARSE // max(self.total, 1)
        if not self.ui.live and tenth > self.said:
            self.said = tenth
            self.pending = self._speed()

    def _say(self) -> None:
        """Say the last line that is due: once the next step begins, because the step's evaluation comes behind it."""
        if self.pending is not None:
            self.ui.note(f"step {self.done}/{self.total}  {self._losses()}  {self.pending}")
            self.pending = None

    @property
    def _seconds(self) -> float:
        return self.elapsed - self.first[1] if self.first else 0.0

    def _speed(self) -> str:
        steps = self.done - self.first[0] if self.first else 0
        if not steps or self._seconds <= 0:
            return ""
        left = (self.total - self.done) * self._seconds / steps
        return f"{self.tokens / self._seconds:,.0f} tokens/s  {_clock(left)} left"

    def _losses(self) -> str:
        parts = []
        for name, line in self.lines.items():
            if line.losses:
                held = f" (held-out {line.held_out[-1]:.3f})" if line.held_out else ""
                parts.append(f"{name} loss {_smooth(line.losses):.3f}{held}")
        return ", ".join(parts)

    def _render(self) -> RenderableType:
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            Text(f"step {self.done}/{self.total or '?'}"),
            ProgressBar(total=max(self.total, 1), completed=self.done, width=28),
            Text(self._speed() or "getting ready", style="dim"),
        )
        table = Ui.table("prompt", "method", "loss", "", "held-out", "state", right=("loss", "held-out"))
        for name, line in self.lines.items():
            table.add_row(
                Text(name, style="bold"),
                Text(line.method),
                f"{_smooth(line.losses):.3f}" if line.losses else "",
                Text(sparkline(line.losses), style="cyan"),
                f"{line.held_out[-1]:.3f}" if line.held_out else "",
                Text(line.state, style="red" if line.state == "failed" else "dim"),
            )
        return Group(table, bar)


def sparkline(values: list[float], width: int = _CURVE) -> str:
    """A curve in one line of text.

    Args:
        values: the curve, any number of points.
        width: most characters.
    """
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return ""
    count = min(width, len(values))
    edges = [i * len(values) // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    if high == low:
        return _BLOCKS[0] * count
    return "".join(_BLOCKS[round((mean - low) / (high - low) * (len(_BLOCKS) - 1))] for mean in means)


def _smooth(losses: list[float]) -> float:
    last = losses[-8:]
    return sum(last) / len(last)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
