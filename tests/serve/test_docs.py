"""docs/serving.md says what the code does. Oracle: the options and errors themselves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer

from overture.cli import app
from overture.serve.config import ServeConfig

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


def options(*words: str) -> dict[str, Any]:
    """The options of a command, by name, with their defaults."""
    command: Any = typer.main.get_command(app)
    for word in words:
        command = command.get_command(typer.Context(command), word)
    return {name: parameter.default for parameter in command.params for name in parameter.opts}


def test_limits_are_those_of_the_command() -> None:
    rows = re.findall(r"^\| `(--[a-z-]+)` \| (\d+) \|", PAGE, re.MULTILINE)
    assert len(rows) == 9
    found = options("serve")
    assert [(name, float(default)) for name, default in rows] == [(name, float(found[name])) for name, _ in rows]
    for name in ("requests_per_minute", "concurrency", "queue", "answer_seconds", "drain_seconds"):
        assert found[f"--{name.replace('_', '-')}"] == getattr(ServeConfig(), name)
    config = ServeConfig()
    assert (config.request_bytes, config.body_seconds, config.choices) == (2 << 20, 30, 64)


def test_every_option_that_is_named_exists() -> None:
    served = options("serve") | options("keys", "add")
    named = set(re.findall(r"`(--[a-z-]+)", PAGE)) | set(re.findall(r"overture serve .*?(--[a-z-]+)", PAGE))
    assert named - {"--host"} <= set(served)


def test_every_code_of_an_error_is_explained() -> None:
    source = "".join(path.read_text() for path in (ROOT / "overture" / "serve").glob("*.py"))
    codes = set(re.findall(r'code="([a-z_]+)"', source)) - {"internal_error", "not_local", "not_ready"}
    assert len(codes) > 8
    assert [code for code in sorted(codes) if f"`{code}`" not in PAGE] == []


@pytest.mark.parametrize("file", ["overture.service", "Containerfile"])
def test_deployments_start_the_server_with_its_options(file: str) -> None:
    text = (ROOT / "deploy" / file).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    used = {word for line in lines for word in re.findall(r"(?<![\w-])--[a-z-]+(?:=\S+)?", line)}
    pip = {"--no-cache-dir", "--extra-index-url", "--system", "--create-home"}
    health = {"--interval=30s", "--timeout=5s", "--start-period=60s"}
    assert {"--store"} <= used - pip - health <= set(options("serve"))
