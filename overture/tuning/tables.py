"""Tables of rows that are read in places: one pass says where every row stands, later passes read a few of them.

A table of many users may be larger than memory, and is read once for its index; each user's rows are read when the
user's turn has come.
"""

from __future__ import annotations

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from overture.errors import DataError
from overture.tuning.data import SUFFIXES, Row, csv_header, csv_reader, csv_row, load_rows, parse_json

__all__ = ["Place", "Record", "Table", "open_table"]


class Place(NamedTuple):
    """Where a row stands."""

    offset: int
    """Bytes before it, or rows before it where a file has no bytes to count."""
    number: int
    """Its line or row, from 1, for people."""


@dataclass(frozen=True, slots=True)
class Record:
    """One row as the index pass meets it."""

    place: Place
    where: str
    value: object
    """A mapping; a `DataError`, or something else, is a bad row."""
    data: bytes
    """What the row is made of, to tell it from another."""


class Table(ABC):
    """A file of rows. Small and picklable: it holds no open file, and rows only where the format forces it to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stamp = _stamp(path)

    @abstractmethod
    def scan(self) -> Iterator[Record]:
        """Every row in order."""

    @abstractmethod
    def _values(self, places: Sequence[Place]) -> Iterator[Any]:
        """The rows at `places`, in order."""

    def read(self, places: Sequence[Place]) -> Iterator[Row]:
        """The rows that `scan` found at `places`, in order.

        Raises:
            DataError: the file is not the one that was scanned.
        """
        if _stamp(self.path) != self.stamp:
            raise DataError(
                expected=f"{self.path} as it was when the run began",
                got="a file that changed since",
                do="leave the table alone while prompts are tuned; start again with --resume",
            )
        for place, values in zip(places, self._values(places), strict=True):
            yield Row({k: v for k, v in values.items() if v is not None}, self.where(place))

    def where(self, place: Place) -> str:
        """The place, for people."""
        return f"{self.path}:{place.number}"


class JsonLines(Table):
    """One JSON object per line."""

    def scan(self) -> Iterator[Record]:
        """Every line that is not blank."""
        with self.path.open("rb") as file:
            offset = 0
            for number, line in enumerate(file, 1):
                if line.strip():
                    place = Place(offset, number)
                    text = _decoded(line, self.where(place), first=offset == 0)
                    yield Record(place, self.where(place), parse_json(text), line.strip())
                offset += len(line)

    def _values(self, places: Sequence[Place]) -> Iterator[Any]:
        with self.path.open("rb") as file:
            for place in places:
                file.seek(place.offset)
                yield json.loads(file.readline().decode("utf-8-sig"))


class Separated(Table):
    """Cells with commas or tabs between them, and a first line that names the columns."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.dialect = csv.excel_tab if path.suffix.lower() == ".tsv" else csv.excel
        self.header: list[str] = []

    def scan(self) -> Iterator[Record]:
        """Every row behind the header. A row may have line breaks inside quotes."""
        with self.path.open("rb") as file:
            lines = _Lines(file, self.path)
            reader = csv_reader(lines, self.dialect)
            self.header = []
            while True:
                place, lines.taken = Place(lines.offset, lines.number + 1), b""
                where = self.where(place)
                try:
                    cells = next(reader, None)
                except csv.Error as error:
                    do = 'write a quote inside quotes as ""'
                    yield Record(place, where, DataError(expected="a well-formed row", got=str(error), do=do), b"")
                    return  # after a broken quote nothing further can be trusted
                if cells is None:
                    return
                if cells and not self.header:
                    self.header = csv_header(cells, where)
                elif cells:
                    names = "\x1f".join(self.header).encode()
                    yield Record(place, where, csv_row(self.header, cells), names + b"\n" + lines.taken)

    def _values(self, places: Sequence[Place]) -> Iterator[Any]:
        with self.path.open("rb") as file:
            for place in places:
                file.seek(place.offset)
                lines = _Lines(file, self.path, offset=place.offset)
                yield csv_row(self.header, next(csv_reader(lines, self.dialect)))


class Parquet(Table):
    """A Parquet file. Its rows are read by row groups, so one that is sorted by user is read fastest."""

    def scan(self) -> Iterator[Record]:
        """Every row, a batch of them in memory at a time."""
        with _parquet(self.path) as file:
            number = 0
            for batch in file.iter_batches():
                for value in batch.to_pylist():
                    place = Place(number, number := number + 1)
                    data = json.dumps(value, sort_keys=True, default=repr).encode()
                    yield Record(place, self.where(place), value, data)

    def _values(self, places: Sequence[Place]) -> Iterator[Any]:
        with _parquet(self.path) as file:
            start, left = 0, list(places)
            for group in range(file.num_row_groups):
                end = start + file.metadata.row_group(group).num_rows
                inside = [place.offset - start for place in left if place.offset < end]
                if inside:
                    yield from file.read_row_group(group).take(inside).to_pylist()
                start, left = end, left[len(inside) :]

    def where(self, place: Place) -> str:
        """The place, for people."""
        return f"{self.path} row {place.number}"


class Whole(Table):
    """A JSON file, which is one value and must be read at once."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.rows = load_rows(path)

    def scan(self) -> Iterator[Record]:
        """Every row."""
        for number, row in enumerate(self.rows, 1):
            data = json.dumps(dict(row.values), sort_keys=True).encode()
            yield Record(Place(number - 1, number), row.where, row.values, data)

    def _values(self, places: Sequence[Place]) -> Iterator[Any]:
        return (self.rows[place.offset].values for place in places)

    def where(self, place: Place) -> str:
        """The place, for people."""
        return self.rows[place.offset].where


_KINDS: dict[str, type[Table]] = {
    ".jsonl": JsonLines,
    ".json": Whole,
    ".csv": Separated,
    ".tsv": Separated,
    ".parquet": Parquet,
}


def open_table(path: Path) -> Table:
    """A table to be read in places.

    Raises:
        DataError: no such file, or one of another kind.
    """
    kind = _KINDS.get(path.suffix.lower())
    if kind is None or not path.is_file():
        raise DataError(
            expected=f"a folder with a file for each user, or one table ({', '.join(SUFFIXES)})",
            got=f"{path}, {'which is neither' if path.exists() else 'which is not there'}",
            do=f"check the path: {path.absolute()}",
        )
    return kind(path)


class _Lines:
    """Decoded lines of a file, and how far they reach. The csv module asks for no line before it needs it."""

    def __init__(self, file: BinaryIO, path: Path, *, offset: int = 0) -> None:
        self.file, self.path, self.offset, self.number, self.taken = file, path, offset, 0, b""

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self.file.readline()
        if not line:
            raise StopIteration
        text = _decoded(line, f"{self.path}:{self.number + 1}", first=self.offset == 0)
        self.offset, self.number, self.taken = self.offset + len(line), self.number + 1, self.taken + line
        return text[:-2] + "\n" if text.endswith("\r\n") else text


def _decoded(line: bytes, where: str, *, first: bool) -> str:
    try:
        return line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            expected="text in UTF-8", got=f"the byte 0x{line[error.start]:02x} ({where})", do="save the file as UTF-8"
        ) from None


def _parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            expected="a readable Parquet file", got=f"{path}: {str(error).splitlines()[0]}", do="write the file again"
        ) from None


def _stamp(path: Path) -> tuple[int, int] | None:
    if not path.is_file():
        return None
    found = path.stat()
    return found.st_size, found.st_mtime_ns
