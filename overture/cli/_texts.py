"""Texts that a verb answers: from its arguments or from standard input, and as they are shown."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import typer

from overture.errors import DataError

__all__ = ["texts_of", "words_of"]


def texts_of(given: Sequence[str] | None) -> list[str]:
    """The texts given, or the one on standard input.

    Raises:
        DataError: a text is empty.
    """
    if not given:
        if sys.stdin.isatty():
            typer.echo("Type the text, then Ctrl-D:", err=True)
        given = [sys.stdin.read().rstrip("\n")]
    if not all(given):
        raise DataError(
            expected="a text to answer", got="an empty one", do="give it as an argument or on standard input"
        )
    return list(given)


def words_of(item: Any) -> str:
    """A text, a row or messages in one line."""
    if isinstance(item, Mapping):
        return ", ".join(f"{name}={value}" for name, value in item.items())
    return item if isinstance(item, str) else str(item[-1]["content"])
