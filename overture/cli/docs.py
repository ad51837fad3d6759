"""`docs/cli.md` from the command itself: `python -m overture.cli.docs > docs/cli.md`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

import typer

from overture.cli import EXIT_CODES, app

__all__ = ["render"]

_INTRO = """# The command `overture`

<!-- Made by `python -m overture.cli.docs > docs/cli.md`. A test compares it. -->

{help}

Results go to stdout; progress and errors to stderr. With `--json` a command prints exactly one JSON document on stdout,
an error included: `{{"error": ..., "expected": ..., "got": ..., "do": ...}}`. Progress bars appear only on a terminal;
elsewhere a few plain lines stand for them, and none with `--quiet` or `--json`.

## Exit codes

| code | meaning |
|---|---|
{codes}
"""


def render() -> str:
    """The page as Markdown, a pure function of the app."""
    root: Any = typer.main.get_command(app)
    context = typer.Context(root, info_name="overture")
    codes = "\n".join(f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items())
    parts = [_INTRO.format(help=root.help, codes=codes)]
    return "\n".join([*parts, *_commands(root, context)])


def _commands(group: Any, context: typer.Context) -> Iterator[str]:
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        yield "\n".join(_command(name, command, context))
        if hasattr(command, "list_commands"):  # a group of verbs
            yield from _commands(command, typer.Context(command, info_name=name, parent=context))


def _command(name: str, command: Any, parent: typer.Context) -> Iterator[str]:
    context = typer.Context(command, info_name=name, parent=parent)
    usage = " ".join(command.collect_usage_pieces(context))
    path = context.command_path
    yield f"##{'#' * path.count(' ', len('overture '))} `{path}`\n"
    yield re.sub(r"\s*\n\s*\n\s*", "\n\n", command.help or "").strip() + "\n"
    yield f"```console\n$ {path} {usage}\n```\n"
    yield "| argument or option | meaning |\n|---|---|"
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            names, meaning = (_cell(text) for text in record)
            yield f"| `{names}` | {meaning} |"
    yield ""


def _cell(text: str) -> str:
    text = re.sub(r"\[default: \(([^)]*)\)", r"[default: \1", text)
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


if __name__ == "__main__":
    sys.stdout.write(render())
