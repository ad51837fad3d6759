"""`--compat FILE` writes what every cell of the matrix came to, and with which versions, for `make compat`."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

CELLS = pytest.StashKey[dict[str, dict[str, object]]]()
PACKAGES = ("torch", "transformers", "accelerate", "torchao", "optimum-quanto")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compat", metavar="FILE", type=Path, help="write the results of the compatibility matrix here")


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Notes a cell's result."""
    found = request.config.stash.setdefault(CELLS, {})

    def note(family: str, feature: str, result: str, deviation: float | None = None) -> None:
        found.setdefault(family, {})[feature] = {"result": result, "deviation": deviation}

    return note


def pytest_sessionfinish(session: pytest.Session) -> None:
    # The option is unknown where this file is found late, as in a run of all tests.
    path = session.config.getoption("--compat", default=None)
    if path is not None:
        versions = {"Python": platform.python_version()} | {name: version(name) for name in PACKAGES}
        report = {"versions": versions, "cells": session.config.stash.get(CELLS, {})}
        path.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n", encoding="utf-8")
