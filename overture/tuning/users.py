"""Many users' rows: a folder with a file for each, or one table with a column that says whose each row is."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from overture.errors import ConfigError, DataError
from overture.store.names import check_tenant
from overture.tuning.data import SUFFIXES, BadRow, Row, load_rows, raise_bad_rows
from overture.tuning.tables import Place, Record, Table, open_table

__all__ = ["USER_COLUMNS", "User", "Users"]

USER_COLUMNS = ("user", "user_id", "username", "speaker", "author", "customer")
"""Columns that are taken for the user's, where a table has exactly one of them."""

_TEXTS = ("text", "prompt", "completion", "messages")


class User(Iterable[Row]):
    """One user's rows. They are read when they are gone through, and not kept."""

    @abstractmethod
    def digest(self) -> str:
        """SHA-256 of what the rows are made of, in order."""

    @abstractmethod
    def size(self) -> tuple[int, int]:
        """How many rows there are, and how many words in them."""


@dataclass(frozen=True, slots=True)
class UserFile(User):
    """A user with a file of their own."""

    path: Path

    def __iter__(self) -> Iterator[Row]:
        return iter(load_rows(self.path))

    def digest(self) -> str:
        """SHA-256 of the file."""
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return ""  # what is wrong with the file is said where it is read

    def size(self) -> tuple[int, int]:
        """Rows and words; none of a file that cannot be read, which is for the tuning to say."""
        try:
            rows = load_rows(self.path)
        except (DataError, OSError):
            return 0, 0
        return len(rows), sum(_words(row.values, None) for row in rows)


@dataclass(slots=True)
class UserRows(User):
    """A user with some rows of a table."""

    table: Table
    offsets: array[int] = field(default_factory=lambda: array("Q"))
    numbers: array[int] = field(default_factory=lambda: array("Q"))
    words: int = 0
    hash: bytes = b""

    def add(self, record: Record, column: str) -> None:
        """Note one more row."""
        self.offsets.append(record.place.offset)
        self.numbers.append(record.place.number)
        self.words += _words(record.value, column) if isinstance(record.value, Mapping) else 0
        # A chain, because a hash object in the making could not be pickled.
        self.hash = hashlib.sha256(self.hash + record.data).digest()

    def __iter__(self) -> Iterator[Row]:
        return self.table.read([Place(*place) for place in zip(self.offsets, self.numbers, strict=True)])

    def digest(self) -> str:
        """SHA-256 of the rows."""
        return self.hash.hex()

    def size(self) -> tuple[int, int]:
        """Rows and words."""
        return len(self.offsets), self.words


class Users(Mapping[str, User]):
    """Users by name, as `tune_many` takes them: nobody's rows are in memory before their turn has come.

    Args:
        users: them.
        column: the table's column that names the user; None for a folder.
        ignored: files of the folder that are nobody's rows.
        unnamed: where the table's rows stand that name nobody, and are left out.
    """

    def __init__(
        self,
        users: Mapping[str, User],
        *,
        column: str | None = None,
        ignored: tuple[str, ...] = (),
        unnamed: tuple[str, ...] = (),
    ) -> None:
        self._users, self.column, self.ignored, self.unnamed = dict(users), column, ignored, unnamed

    @classmethod
    def open(cls, path: str | PathLike[str], column: str | None = None) -> Users:
        """Users of a folder or of a table.

        Args:
            path: a folder with a file for each user, named as the user; or one table, which is gone through once.
            column: the table's column that names the user; None for the one of `USER_COLUMNS` that it has.

        Raises:
            DataError: neither, nobody in it, or rows that cannot be read; the first five are shown.
            ConfigError: no such column, several that could be meant, or a name that no user can have.
        """
        path = Path(path)
        return _folder(path, column) if path.is_dir() else _table(path, column)

    def at_least(self, *, rows: int = 0, words: int = 0) -> Users:
        """Those who have so many rows and words (of the columns text, prompt, completion and messages; where a row
        has none of these, of all its text).
        """
        sizes = {name: user.size() for name, user in self._users.items()} if rows or words else {}
        kept = {
            n: user for n, user in self._users.items() if not sizes or (sizes[n][0] >= rows and sizes[n][1] >= words)
        }
        return Users(kept, column=self.column, ignored=self.ignored, unnamed=self.unnamed)

    def only(self, names: Iterable[str]) -> Users:
        """Those of these names."""
        wanted = set(names)
        kept = {name: user for name, user in self._users.items() if name in wanted}
        return Users(kept, column=self.column, ignored=self.ignored, unnamed=self.unnamed)

    def __getitem__(self, name: str) -> User:
        return self._users[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._users)

    def __len__(self) -> int:
        return len(self._users)


def _folder(path: Path, column: str | None) -> Users:
    if column is not None:
        raise ConfigError(
            expected="a table, to look for users in a column",
            got=f"the folder {path} and the column {column!r}",
            do="leave the column out (the files' names are the users), or name one table",
        )
    files = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    found: dict[str, User] = {}
    named: dict[str, str] = {}
    ignored = []
    for file in files:
        if not file.is_file() or file.suffix.lower() not in SUFFIXES:
            ignored.append(file.name)
            continue
        name = _user(file.stem)
        if name in found:
            raise DataError(
                expected="one file for each user",
                got=f"{named[name]} and {file.name} in {path}",
                do="join the two, or rename one of them",
            )
        found[name], named[name] = UserFile(file), file.name
    if not found:
        raise DataError(
            expected=f"a file for each user in {path} ({', '.join(SUFFIXES)})",
            got=f"none among {len(files)} files" if files else "an empty folder",
            do="name each file after its user, such as ada.jsonl",
        )
    return Users(found, ignored=tuple(ignored))


def _table(path: Path, column: str | None) -> Users:
    table = open_table(path)
    found: dict[str, UserRows] = {}
    bad: list[BadRow] = []
    unnamed: list[str] = []
    for record in table.scan():
        if not isinstance(record.value, Mapping):
            bad.append((record.where, _unreadable(record.value)))
            continue
        column = column or _column(record.value, path)
        if record.value.get(column) in (None, ""):
            unnamed.append(record.where)
            continue
        try:
            name = _name(record.value, column)
        except DataError as error:
            bad.append((record.where, error))
        else:
            found.setdefault(name, UserRows(table)).add(record, column)
    raise_bad_rows(bad)
    if not found:
        where = f"none in {path}" + (f", {len(unnamed)} rows of which name nobody in {column!r}" if unnamed else "")
        raise DataError(
            expected="at least one row of a user", got=where, do="add rows, or choose another column (--user-column)"
        )
    return Users(found, column=column, unnamed=tuple(unnamed))


def _name(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(
            expected=f"a user's name, or nothing, in the column {column!r} of every row",
            got=repr(value)[:40],
            do="correct the column, or choose another with --user-column",
        )
    return _user(str(value))


def _user(name: str) -> str:
    try:
        return check_tenant(name)
    except ConfigError as error:
        raise DataError(expected=error.expected, got=error.got, do="rename the user") from None


def _unreadable(value: object) -> DataError:
    if isinstance(value, DataError):
        return value
    return DataError(expected="an object with named columns", got=repr(value)[:40], do="write one object per row")


def _column(row: Mapping[str, Any], path: Path) -> str:
    likely = [name for name in USER_COLUMNS if name in row]
    if len(likely) == 1:
        return likely[0]
    raise ConfigError(
        expected=f"one column that says whose a row is ({', '.join(USER_COLUMNS)})",
        got=f"{' and '.join(likely) or 'none of them'} in {path}, whose columns are {', '.join(map(str, row))}",
        do="name the column: --user-column NAME",
    )


def _words(row: Mapping[str, Any], column: str | None) -> int:
    texts = [row[name] for name in _TEXTS if name in row] or [text for name, text in row.items() if name != column]
    return sum(_count(text) for text in texts)


def _count(text: object) -> int:
    if isinstance(text, str):
        return len(text.split())
    if isinstance(text, list):  # messages
        return sum(_count(message.get("content")) for message in text if isinstance(message, Mapping))
    return 0
