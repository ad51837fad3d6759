"""Rows of training data from files, `datasets` and lists, with every bad row named by file and line."""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from overture.errors import DataError, OvertureError
from overture.runtime.chat import short

__all__ = [
    "SUFFIXES",
    "BadRow",
    "Row",
    "Source",
    "csv_header",
    "csv_reader",
    "csv_row",
    "load_rows",
    "parse_json",
    "raise_bad_rows",
]

SHOWN = 5
_SHOWN_CHARACTERS = 40

# The csv module refuses cells over 131,072 characters; a C long has 32 bits on Windows.
_LONGEST_CELL = 2**31 - 1

Source = str | PathLike[str] | Iterable[Any]
"""A path, a `datasets.Dataset`, mappings, or `Row`s."""

BadRow = tuple[str, DataError]
"""Where a bad row stands, and what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of data and the place it came from."""

    values: Mapping[str, Any]
    """The row's columns. A column whose value is missing (`None`) is left out."""
    where: str
    """For people: `poet.jsonl:12` (a line), `poet.parquet row 12` or `row 12`, counted from 1."""


Raw = tuple[str, Any]
"""Where an unchecked row stands, and the row: a mapping, a `DataError`, or something else that makes it a bad row."""


def load_rows(source: Source, *, kind: str = "training") -> list[Row]:
    """Read all rows of a data source.

    Args:
        source: a path to a `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet` file, a `datasets.Dataset`, mappings, or
            `Row`s, which keep their places.
        kind: what the data is for, named in errors: `training`, `dev`, ...

    Returns:
        The rows in order; at least one.

    Raises:
        DataError: no such file, a folder, an unknown suffix, a wrong encoding, no rows, or rows that are no objects.
            All bad rows are counted and the first five shown.
    """
    rows: list[Row] = []
    bad: list[BadRow] = []
    for where, value in _read(source, kind):
        if isinstance(value, Mapping):
            rows.append(Row({k: v for k, v in value.items() if v is not None}, where))
        else:
            bad.append((where, value if isinstance(value, DataError) else _not_an_object(value)))
    raise_bad_rows(bad)
    if not rows:
        raise DataError(
            expected=f"at least one row of {kind} data",
            got=f"no rows in {_name(source)}",
            do="add rows, one object each, or name another file",
        )
    return rows


def rows_of(data: Mapping[str, Source], name: str, *, kind: str = "training") -> list[Row]:
    """The rows of one prompt.

    Raises:
        OvertureError: as `load_rows`, and for whatever else a source may raise.
    """
    try:
        return load_rows(data[name], kind=kind)
    except OvertureError:
        raise
    except Exception as error:  # whatever a source of the caller's own may raise is about this prompt's rows
        raise DataError(
            expected="rows that can be read",
            got=f"{type(error).__name__}: {error}",
            do="mend the data, and tune this prompt again",
        ) from error


def raise_bad_rows(bad: Sequence[BadRow]) -> None:
    """Raise one `DataError` for all bad rows, if there are any: the first five with their places, and the total.

    Raises:
        DataError: there is a bad row.
    """
    if not bad:
        return
    if len(bad) == 1:
        where, error = bad[0]
        raise DataError(expected=error.expected, got=f"{error.got} ({where})", do=error.do)
    shown = bad[:SHOWN]
    lines = [f"\n  {where}: expected {error.expected}; got {error.got}" for where, error in shown]
    if len(bad) > SHOWN:
        lines.append(f"\n  and {len(bad) - SHOWN} more")
    raise DataError(
        expected="every row to be usable",
        got=f"{len(bad)} bad rows:{''.join(lines)}",
        do="; ".join(dict.fromkeys(error.do for _, error in shown)),
    )


def _read(source: object, kind: str) -> Iterator[Raw]:
    if isinstance(source, str | PathLike):
        path = _existing(Path(source), kind)
        return _READERS[path.suffix.lower()](path)
    if isinstance(source, Iterable) and not isinstance(source, Mapping | bytes):
        return (
            (value.where, value.values) if isinstance(value, Row) else (f"row {number}", value)
            for number, value in enumerate(source, 1)
        )
    splits = f" with the keys {', '.join(map(str, source))}" if isinstance(source, Mapping) else ""
    raise DataError(
        expected=f"{kind} data: a path, a datasets.Dataset, or a list of objects",
        got=f"{type(source).__name__}{splits}",
        do="pass one split of a DatasetDict, as in data['train']; put a single row into a list",
    )


def _name(source: Source) -> str:
    return str(source) if isinstance(source, str | PathLike) else f"the {type(source).__name__}"


def _existing(path: Path, kind: str) -> Path:
    suffixes = ", ".join(_READERS)
    if path.is_dir():
        raise DataError(
            expected=f"a {kind} file ({suffixes})", got=f"the folder {path}", do="name one file inside the folder"
        )
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, siblings)
        hint = f"did you mean {' or '.join(str(path.with_name(name)) for name in close)}? " if close else ""
        raise DataError(
            expected=f"a {kind} file at {path}", got="no such file", do=f"{hint}check the path: {path.absolute()}"
        )
    if path.suffix.lower() not in _READERS:
        raise DataError(
            expected=f"a {kind} file that ends in {suffixes}", got=str(path), do="convert the file, or rename it"
        )
    return path


def _not_an_object(value: object) -> DataError:
    return DataError(
        expected='an object with named columns, such as {"prompt": "...", "completion": "..."}',
        got=f"{type(value).__name__} {short(value, _SHOWN_CHARACTERS)}",
        do="write one object per row",
    )


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            expected="text in UTF-8",
            got=f"the byte 0x{data[error.start]:02x} ({path}:{line})",
            do="save the file as UTF-8",
        ) from None


def _json_lines(path: Path) -> Iterator[Raw]:
    return _parse_lines(path, _text(path))


def _parse_lines(path: Path, text: str) -> Iterator[Raw]:
    # Not `splitlines`: JSON strings may hold U+2028 and other line breaks of Unicode.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", parse_json(line)


def parse_json(text: str) -> object:
    """The value that a line of JSON holds, or the `DataError` that says why it holds none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        got = f"{short(text.strip(), _SHOWN_CHARACTERS)}: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:
        got = f"{short(text.strip(), _SHOWN_CHARACTERS)}: {error}"
    return DataError(expected="valid JSON, one object per line", got=got, do="mend the JSON or delete the line")


def _json(path: Path) -> Iterator[Raw]:
    text = _text(path)
    if not text.lstrip().startswith("["):
        yield from _one_object(path, text) or _parse_lines(path, text)
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            expected="a valid JSON array of objects",
            got=f"{error.msg} at column {error.colno} ({path}:{error.lineno})",
            do="mend the JSON, or write one object per line",
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            expected="a valid JSON array of objects", got=f"{error} ({path})", do="write one object per line"
        ) from None
    yield from ((f"{path} row {number}", row) for number, row in enumerate(rows, 1))


def _one_object(path: Path, text: str) -> list[Raw]:
    """The single row of a file that is one object over several lines; none if it is something else."""
    try:
        return [(f"{path}:1", json.loads(text))]
    except (ValueError, RecursionError):
        return []


def _csv(path: Path) -> Iterator[Raw]:
    return _table(path, csv.excel)


def _tsv(path: Path) -> Iterator[Raw]:
    return _table(path, csv.excel_tab)


def _table(path: Path, dialect: type[csv.Dialect]) -> Iterator[Raw]:
    lines = _text(path).replace("\r\n", "\n").split("\n")
    reader = csv_reader((line + "\n" for line in lines), dialect)
    header: list[str] | None = None
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield where, DataError(expected="a well-formed row", got=str(error), do='write a quote inside quotes as ""')
            # After a broken quote nothing further can be trusted.
            return
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = csv_header(cells, where)
        else:
            yield where, csv_row(header, cells)


def csv_reader(lines: Iterable[str], dialect: type[csv.Dialect]) -> Any:
    """A reader of cells of any length, from lines that end in a line break."""
    csv.field_size_limit(_LONGEST_CELL)
    return csv.reader(lines, dialect, strict=True)


def csv_row(header: Sequence[str], cells: Sequence[str]) -> object:
    """The columns of a row, or the `DataError` that says why it has none."""
    if len(cells) == len(header):
        return dict(zip(header, cells, strict=True))
    return DataError(
        expected=f"{len(header)} cells ({', '.join(header)})",
        got=f"{len(cells)} cells",
        do="quote cells that hold the separator or a line break",
    )


def csv_header(cells: list[str], where: str) -> list[str]:
    """The names of a table's columns.

    Raises:
        DataError: a column without a name, or two of one name.
    """
    if len(set(cells)) == len(cells) and all(cell.strip() for cell in cells):
        return cells
    raise DataError(
        expected="a first line that names every column once",
        got=f"{', '.join(map(repr, cells))} ({where})",
        do="name the columns in the first line, each differently",
    )


def _parquet(path: Path) -> Iterator[Raw]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            expected="a readable Parquet file", got=f"{path}: {str(error).splitlines()[0]}", do="write the file again"
        ) from None
    yield from ((f"{path} row {number}", row) for number, row in enumerate(rows, 1))


_READERS = {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _tsv, ".parquet": _parquet}

SUFFIXES = tuple(_READERS)
"""What names of data files end in."""
