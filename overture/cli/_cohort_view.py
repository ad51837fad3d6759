"""Live progress of a run with many users: a table that stays small, or now and then a line where nobody looks."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from overture.cli._progress import sparkline
from overture.cli._ui import Ui
from overture.tuning.events import CheckpointSaved, Evaluated, Event, Failed, Finished, Started, StepDone

__all__ = ["CohortView"]

_SHOWN = 8
"""Users in training that are shown; the others are counted."""
_LAST = 3
"""Users shown of those that ended last."""
_CURVE = 48
"""Losses kept of a user in training."""
_SPARSE = 20
"""Lines in all where nobody looks, and one a minute besides."""


@dataclass
class _User:
    """What is known of a user in training."""

    step: int
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=_CURVE))
    held_out: float | None = None


class CohortView:
    """Shows the events of `tune_many` with many users; pass it as `on_event`.

    Args:
        ui: the screen.
        total: users of the run, those included who were done before.
        steps: steps of each at most.
        done: users who were done before.
        clock: seconds, from anywhere.
    """

    def __init__(
        self, ui: Ui, total: int, steps: int, *, done: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.ui, self.total, self.steps, self.done, self.clock = ui, total, steps, done, clock
        self.before = done
        self.running: dict[str, _User] = {}
        self.failed = 0
        self.ended: deque[tuple[str, str, bool]] = deque(maxlen=_LAST)
        self.work = 0
        """Steps of all users, taken or no longer needed, in this run."""
        self.began: tuple[float, int] | None = None
        self.said = (0, clock())
        self.live = Live(console=ui.err, transient=True, refresh_per_second=4, get_renderable=self._render)

    def __enter__(self) -> CohortView:
        if self.ui.live:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.live.stop()

    def __call__(self, event: Event) -> None:
        """Take in one event."""
        match event:
            case Started():
                self.running[event.name] = _User(event.step)
            case StepDone():
                self._step(event)
            case Evaluated() if event.name in self.running:
                self.running[event.name].held_out = event.loss
            case Finished():
                self.done += 1
                self._end(event.name, event.reason, failed=False)
            case Failed():
                self.failed += 1
                self._end(event.name, event.error.got.splitlines()[0], failed=True)
            case CheckpointSaved() | Evaluated():
                pass
        if not self.ui.live:
            self._say()

    @property
    def waiting(self) -> int:
        """Users whose turn has not come."""
        return max(self.total - self.done - self.failed - len(self.running), 0)

    def _step(self, event: StepDone) -> None:
        for name, loss in event.losses.items():
            if name in self.running:
                self.running[name].step += 1
                self.running[name].losses.append(loss)
                self.work += 1
        if self.began is None:  # the first step also warms up
            self.began = (self.clock(), self.work)

    def _end(self, name: str, how: str, *, failed: bool) -> None:
        user = self.running.pop(name, _User(0))
        self.work += max(self.steps - user.step, 0)
        self.ended.append((name, how, failed))

    def _pace(self) -> tuple[float, float] | None:
        """Users per minute and seconds left, as steps have gone since the first; None before there is a pace."""
        if self.began is None:
            return None
        seconds, work = self.clock() - self.began[0], self.work - self.began[1]
        if seconds <= 0 or work <= 0:
            return None
        left = self.waiting * self.steps + sum(max(self.steps - user.step, 0) for user in self.running.values())
        return work / seconds / self.steps * 60, left * seconds / work

    def _counts(self) -> str:
        parts = [f"{self.waiting:,} waiting", f"{len(self.running):,} running", f"{self.done:,} done"]
        return ", ".join(parts) + (f", {self.failed:,} failed" if self.failed else "")

    def _speed(self) -> str:
        pace = self._pace()
        return "" if pace is None else f"{_short(pace[0])} users/min  {_clock(pace[1])} left"

    def _say(self) -> None:
        share = (self.done - self.before + self.failed) * _SPARSE // max(self.total - self.before, 1)
        now = self.clock()
        if share > self.said[0] or now - self.said[1] >= 60:
            self.said = (share, now)
            self.ui.note(f"{self._counts()} of {self.total:,}  {self._speed()}")

    def _render(self) -> RenderableType:
        from rich.table import Table

        bar = Table.grid(padding=(0, 1))
        ended = self.done + self.failed
        bar.add_row(
            Text(f"{ended:,}/{self.total:,} users"),
            ProgressBar(total=max(self.total, 1), completed=ended, width=28),
            Text(self._speed() or "getting ready", style="dim"),
        )
        table = Ui.table("user", "step", "loss", "", "held-out", "state", right=("step", "loss", "held-out"))
        for name, user in list(self.running.items())[:_SHOWN]:
            table.add_row(
                _name(name, "bold"),
                f"{user.step}/{self.steps}",
                f"{user.losses[-1]:.3f}" if user.losses else "",
                Text(sparkline(list(user.losses)), style="cyan"),
                "" if user.held_out is None else f"{user.held_out:.3f}",
                Text("running", style="dim"),
            )
        for name, how, failed in self.ended:
            state = Text(f"failed: {how}" if failed else f"done ({how})", style="red" if failed else "dim")
            state.truncate(60, overflow="ellipsis")
            table.add_row(_name(name, "red" if failed else ""), "", "", "", "", state)
        return Group(table, Text(self._counts(), style="dim"), bar)


def _name(text: str, style: str) -> Text:
    name = Text(text, style=style)
    name.truncate(28, overflow="ellipsis")
    return name


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.1f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
