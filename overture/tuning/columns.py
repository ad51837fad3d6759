"""Columns of rows: which make a shape, and text in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from overture.errors import DataError
from overture.template import Template
from overture.tuning.data import Row

__all__ = ["first_rows", "require_columns", "shape_of", "target_column", "text_of"]


def first_rows(rows: Sequence[Row]) -> dict[str, str]:
    """Every column of the rows, and where it first stands."""
    first: dict[str, str] = {}
    for row in rows:
        for name in row.values:
            first.setdefault(str(name), row.where)
    return first


def shape_of(rows: Sequence[Row], shapes: Mapping[str, frozenset[str]]) -> str:
    """The one shape that the columns of all rows make.

    Args:
        rows: the rows.
        shapes: the columns of each shape; others are left alone.

    Raises:
        DataError: they make none, or more than one.
    """
    known = frozenset[str]().union(*shapes.values())
    first = first_rows(rows)
    present = known & set(first)
    for shape, columns in shapes.items():
        if present == columns:
            return shape
    found = ", ".join(f"{name} (first in {first[name]})" if name in known else name for name in sorted(first))
    raise DataError(
        expected=f"the columns of one shape: {'; '.join(shapes)}",
        got=f"columns {found or '(none)'}",
        do="keep the columns of one shape in every row and rename the others, or pass a template that names yours",
    )


def text_of(row: Mapping[str, Any], column: str, *, numbers: bool = False) -> str:
    """The text in a column.

    Raises:
        DataError: there is none.
    """
    value = row.get(column)
    if isinstance(value, str) or (numbers and isinstance(value, int | float)):
        return str(value)
    got = f"no {column!r}" if value is None else f"{type(value).__name__} in {column!r}"
    raise DataError(expected=f"text in the column {column!r}", got=got, do=f"write text into {column!r} in every row")


def require_columns(rows: Sequence[Row], template: Template) -> None:
    """Raise `DataError` if no row has a column that the template names."""
    present = set(first_rows(rows)) | {"mask"}
    missing = [name for name in template.columns if name not in present]
    if missing:
        raise DataError(
            expected=f"the columns that the template {template.source!r} names: {', '.join(template.columns)}",
            got=f"{_found(rows)}; none is called {' or '.join(map(repr, missing))}",
            do="rename the column in the data or in the template",
        )


def target_column(rows: Sequence[Row], names: Sequence[str]) -> str:
    """The first of `names` that the rows have: the column with the answers.

    Raises:
        DataError: they have none of them.
    """
    present = first_rows(rows)
    target = next((name for name in names if name in present), None)
    if target is None:
        raise DataError(
            expected=f"a column {' or '.join(map(repr, names))} with the answer to learn",
            got=_found(rows),
            do="rename the column that holds the answers",
        )
    return target


def _found(rows: Sequence[Row]) -> str:
    return f"columns {', '.join(sorted(first_rows(rows))) or '(none)'}"
