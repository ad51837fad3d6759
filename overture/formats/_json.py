"""JSON in the one form that `docs/format.md` allows: the same text for equal values, and nothing readers differ on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import isfinite
from typing import Any

from overture.formats._refusal import refusal

__all__ = ["canonical", "parse", "plain"]

_MAX_DEPTH = 32
"""Deepest nesting of arrays and objects."""


def plain(value: object, depth: int = _MAX_DEPTH) -> Any:
    """A copy of `value` in JSON's own types, or a refusal of what other readers would not read back the same."""
    expected = "strings, finite numbers, booleans, null, arrays and objects with string keys"
    do = "store less or simpler information in the prompt's method and metrics"
    match value:
        case None | bool():
            return value
        case str():
            if any("\ud800" <= c <= "\udfff" for c in value):
                raise refusal("text in valid Unicode", f"a lone surrogate in {value[:40]!r}", do)
            return str(value)
        case int():
            if abs(value) > 2**53:
                raise refusal("integers of at most 2^53", "a larger one", do)
            return int(value)
        case float():
            if not isfinite(value):
                raise refusal(expected, str(value), do)
            return float(value)
    if not isinstance(value, list | tuple | Mapping):
        raise refusal(expected, f"a value of type {type(value).__name__}", do)
    if depth == 0:
        raise refusal(f"JSON nested at most {_MAX_DEPTH} deep", "deeper nesting", do)
    if not isinstance(value, Mapping):
        return [plain(item, depth - 1) for item in value]
    if not all(isinstance(key, str) for key in value):
        raise refusal(expected, "an object with a key that is no string", do)
    return {plain(key): plain(item, depth - 1) for key, item in value.items()}


def canonical(value: object) -> str:
    """The one text of a plain value."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))


def parse(text: str, where: str) -> Any:
    """The plain value of a text; `where` names it in errors."""
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise refusal(f"JSON nested at most {_MAX_DEPTH} deep in {where}", "deeper nesting") from None
    except ValueError as error:
        raise refusal(f"valid JSON in {where}", str(error)) from None
    return plain(value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a key that occurs twice")
    return unique


def _no_constant(name: str) -> None:
    raise ValueError(f"{name}, which is not JSON")
