from __future__ import annotations

import io

import pytest
from rich.console import Console

from overture.cli._progress import TuningView, sparkline
from overture.cli._ui import Ui, plain
from overture.errors import DivergedError
from overture.tuning.events import Evaluated, Failed, Finished, StepDone


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_sparkline() -> None:
    assert sparkline([]) == ""
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline([3.0, 2.0, 1.0]) == "█▄▁" or sparkline([3.0, 2.0, 1.0]) == "█▅▁"
    assert len(sparkline([float(i) for i in range(100)], width=10)) == 10
    assert sparkline([1.0, float("nan"), float("inf"), 2.0]) == "▁█"


def test_lines_are_sparse_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    with TuningView(Ui(), {"a": "prefix"}) as view:
        for step in range(1, 1001):
            view(StepDone(step, 1000, {"a": 2.0}, 100, 0.1 * step))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert "1,000 tokens/s" in lines[4]
    assert "0:50 left" in lines[4]


def test_a_line_shows_the_evaluation_of_its_own_step(capsys: pytest.CaptureFixture[str]) -> None:
    """It comes behind the step, and the last one behind the last step."""
    with TuningView(Ui(), {"a": "prefix"}) as view:
        for step in range(1, 3):
            view(StepDone(step, 2, {"a": 2.0}, 100, 0.1 * step))
            view(Evaluated("a", step, float(step), True))
    lines = capsys.readouterr().err.splitlines()
    assert ["held-out 1.000" in lines[0], "held-out 2.000" in lines[1], len(lines)] == [True, True, 2]


@pytest.mark.parametrize("ui", [Ui(json=True), Ui(quiet=True)])
def test_nothing_where_nothing_is_wanted(ui: Ui, capsys: pytest.CaptureFixture[str]) -> None:
    with TuningView(ui, {"a": "prefix"}) as view:
        view(StepDone(1, 1, {"a": 2.0}, 100, 0.1))
    with ui.busy("waiting"):
        assert list(ui.track([1, 2], "counting")) == [1, 2]
    assert capsys.readouterr() == ("", "")


def test_a_person_sees_every_prompt() -> None:
    ui = Ui()
    screen = Console(file=Terminal(), force_terminal=True, width=120, height=40)
    ui.__dict__.update(out=screen, err=screen)  # the consoles are cached properties
    with TuningView(ui, {"poet": "prefix", "[red]coach[/]": "prompt"}) as view:
        for step in (1, 2):
            view(StepDone(step, 4, {"poet": 3.0 - step, "[red]coach[/]": 2.5}, 50, float(step)))
        view(Evaluated("poet", 2, 1.25, True))
        view(Finished("poet", "early stop", 2))
        view(Failed("[red]coach[/]", DivergedError(expected="a", got="b", do="c")))
        view.live.refresh()
        shown = screen.file.getvalue()  # type: ignore[attr-defined]
    for words in ("poet", "[red]coach[/]", "1.250", "early stop", "failed", "step 2/4", "50 tokens/s", "0:02 left"):
        assert words in shown


def test_json_has_no_nan() -> None:
    assert plain({"a": float("nan"), 1: (float("inf"), 2.0)}) == {"a": None, "1": [None, 2.0]}
