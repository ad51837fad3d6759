"""Refusals of a prompt file: each names the file, and says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from overture.errors import OvertureError, PromptFileError

__all__ = ["COPY_AGAIN", "few", "naming", "refusal"]

COPY_AGAIN = "copy the file again from where it came, or tune the prompt again"


def refusal(expected: str, got: str, do: str = COPY_AGAIN) -> PromptFileError:
    """The error to raise."""
    return PromptFileError(expected=expected, got=got, do=do)


def few(*items: object) -> str:
    """The first items, quoted and cut: names in a stranger's file may be long, or control a terminal."""
    shown = [repr(item)[:40] for item in items[:4]]
    return ", ".join(shown) + (", ..." if len(items) > 4 else "")


@contextmanager
def naming(source: str) -> Iterator[None]:
    """Turn every expected failure into a `PromptFileError` that names `source`."""
    try:
        yield
    except OvertureError as error:
        raise refusal(error.expected, f"{error.got} ({source})", error.do) from None
    except OSError as error:
        got, do = f"{error.strerror or error} ({source})", "check the path and its permissions"
        raise refusal("a file that can be read", got, do) from None
