from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from overture.cli._cohort_view import CohortView
from overture.cli._ui import Ui
from overture.errors import DataError
from overture.tuning.events import Evaluated, Failed, Finished, Started, StepDone


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that the test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def screen(rows: int = 40) -> tuple[Ui, Callable[[], str]]:
    ui, console = Ui(), Console(file=Terminal(), force_terminal=True, width=140, height=rows)
    ui.__dict__.update(out=console, err=console)  # the consoles are cached properties
    return ui, console.file.getvalue  # type: ignore[attr-defined]


def step(number: int, **losses: float) -> StepDone:
    return StepDone(number, 1000, losses, 100, float(number))


def test_a_person_sees_who_runs_who_is_done_and_why_one_failed() -> None:
    ui, shown = screen()
    with CohortView(ui, 6, 20, done=1) as view:
        for name in ("ann", "[red]bob[/]", "cy"):
            view(Started(name, 5 if name == "cy" else 0))
        view(step(1, **{"ann": 3.5, "[red]bob[/]": 2.25, "cy": 1.0}))
        view(Evaluated("ann", 1, 1.125, True))
        view(Finished("cy", "early stop", 6))
        view(Failed("dora", DataError(expected="a row", got="an empty file\nwith more", do="fill it")))
        view.live.refresh()
        text = shown()
    for words in ("ann", "1/20", "3.500", "1.125", "[red]bob[/]", "cy", "done (early stop)", "failed: an empty file"):
        assert words in text
    assert "with more" not in text
    assert "1 waiting, 2 running, 2 done, 1 failed" in text
    assert "3/6 users" in text


def test_ten_thousand_users_fit_on_a_screen() -> None:
    ui, _ = screen()
    view = CohortView(ui, 10_000, 20)
    for number in range(500):
        view(Started(f"user {number}", 0))
    view(step(1, **{f"user {number}": 1.0 for number in range(500)}))
    for number in range(100):
        view(Finished(f"user {number}", "steps", 1))
    with ui.err.capture() as captured:
        ui.err.print(view._render())
    assert len(captured.get().splitlines()) < 20
    assert "9,500 waiting, 400 running, 100 done" in captured.get()


def test_pace_and_time_left_are_counted_in_steps() -> None:
    """Oracle: by hand. 4 users of 10 steps, two at a time, a step of both takes 3 s; the first step sets the clock."""
    clock = Clock()
    view = CohortView(Ui(quiet=True), 4, 10, clock=clock)
    view(Started("a", 0)), view(Started("b", 0))
    assert view._pace() is None
    for number in range(1, 6):
        clock.now += 3 if number > 1 else 60
        view(step(number, a=1.0, b=1.0))
    # 8 steps in 12 s. Left are 2 * 5 of those who run and 2 * 10 of those who wait.
    assert view._pace() == (pytest.approx(8 / 12 / 10 * 60), pytest.approx(30 * 12 / 8))
    view(Finished("a", "early stop", 5))  # its other 5 steps are not to be waited for: 13 of the 18 left in 12 s
    assert view._pace() == (pytest.approx(13 / 12 / 10 * 60), pytest.approx(25 * 12 / 13))


def test_lines_are_sparse_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with CohortView(Ui(), 1000, 1, clock=clock) as view:
        for number in range(1000):
            clock.now += 0.1
            view(Started(f"u{number}", 0))
            view(step(number + 1, **{f"u{number}": 1.0}))
            view(Finished(f"u{number}", "steps", 1))
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) <= 21
        assert "0 waiting, 0 running, 1,000 done of 1,000" in lines[-1]
        assert "600 users/min" in lines[9]
        assert "0:50 left" in lines[9]
        clock.now += 61
        view(step(1001))
        assert len(capsys.readouterr().err.splitlines()) == 1  # a sign of life


def test_nothing_where_nothing_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    with CohortView(Ui(json=True), 1, 1) as view:
        view(Started("a", 0)), view(step(1, a=1.0)), view(Finished("a", "steps", 1))
    assert capsys.readouterr() == ("", "")
