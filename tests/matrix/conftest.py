"""`--compat FILE` writes what every cell of the matrix came to, for `make compat`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

CELLS = pytest.StashKey[dict[str, dict[str, object]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compat", metavar="FILE", type=Path, help="write the results of the compatibility matrix here")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[CELLS] = {}


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[str, str, str, float | None], None]:
    """Notes a cell's result."""

    def note(family: str, feature: str, result: str, deviation: float | None = None) -> None:
        cells = request.config.stash[CELLS].setdefault(family, {})
        cells[feature] = {"result": result, "deviation": deviation}

    return note


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--compat")
    if path is not None:
        path.write_text(json.dumps(session.config.stash[CELLS], indent=1, sort_keys=True) + "\n", encoding="utf-8")
