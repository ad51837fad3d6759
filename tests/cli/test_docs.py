from __future__ import annotations

from pathlib import Path

from overture.cli import EXIT_CODES, app
from overture.cli.docs import render
from overture.errors import OvertureError

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"


def test_the_page_is_what_the_command_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run: python -m overture.cli.docs > docs/cli.md"


def test_every_exit_code_is_documented() -> None:
    found, waiting = {OvertureError.exit_code}, [OvertureError]
    while waiting:
        waiting += (subclasses := waiting.pop().__subclasses__())
        found |= {cls.exit_code for cls in subclasses}
    assert found <= EXIT_CODES.keys()


def test_every_verb_has_a_section() -> None:
    assert all(f"## `overture {verb.name}`" in render() for verb in app.registered_commands)
