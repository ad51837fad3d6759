"""The index database: an SQLite file in write-ahead mode, or PostgreSQL. Transactions, and noticing others' changes."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from overture.errors import ConfigError, StoreError
from overture.files import sync_folder
from overture.store.tables import SCHEMA, facts, metadata

__all__ = ["Database", "open_database"]

_WAIT_SECONDS = 60
"""How long a writer waits for another."""
_LOCK_OF_MAKING = 0x6F766572  # "over": PostgreSQL's advisory locks are numbers
_EPOCH = 1 << 64
"""More than any clock or counter comes to."""

Facts = dict[str, str]


class Database:
    """Transactions on one index. Connections are pooled, one per thread in use; safe in threads and after a fork."""

    def __init__(self, url: URL, *, read_only: bool) -> None:
        self._url, self._read_only = url, read_only
        self._lock = threading.Lock()
        self._epoch = 0
        self._start()

    def _start(self) -> None:
        self._process = os.getpid()
        self._engine = (
            _sqlite(self._url, self._read_only) if self.is_sqlite else _postgresql(self._url, self._read_only)
        )
        self._writer = self._engine.execution_options(overture_write=True)
        self._watcher: Any = None
        self._cursor: Any = None

    @property
    def is_sqlite(self) -> bool:
        """True for a file, False for a server."""
        return self._url.get_backend_name() == "sqlite"

    @property
    def shown(self) -> str:
        """The database for messages, without a password."""
        return self._url.database or "" if self.is_sqlite else self._url.render_as_string(hide_password=True)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that sees one moment of the index and waits for no writer."""
        with self._explained(), self._current(self._engine).connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that is durable when this ends, or undone by any exception."""
        with self._explained(), self._current(self._writer).begin() as connection:
            yield connection
        with self._lock:
            self._epoch += 1

    def moment(self, max_age: float) -> int:
        """A number that differs from the last one if others may have changed the index.

        Args:
            max_age: seconds for which PostgreSQL is trusted not to have changed; SQLite is asked each time.
        """
        if not self.is_sqlite:
            now = int(time.monotonic() / max_age) if max_age else time.monotonic_ns()
            return self._epoch * _EPOCH + now  # own changes are seen at once
        with self._lock:
            if self._watcher is None or self._process != os.getpid():
                with self._explained():
                    raw: Any = self._current(self._engine).raw_connection()
                    self._watcher, self._cursor = raw, raw.driver_connection.cursor()
                    self._epoch += 1  # what another connection counts cannot be compared
            try:
                # Changes whenever any other connection has committed, also one of this process.
                version: int = self._cursor.execute("PRAGMA data_version").fetchall()[0][0]
            except sqlite3.Error as error:
                raise _explain(error, self.shown) from error
            return self._epoch * _EPOCH + version

    def forget(self) -> bool:
        """Leave no trace of deleted rows in the database's files, as far as that can be done from here.

        Returns:
            True if it was done; False for PostgreSQL, and while another process has a long transaction open.
        """
        if not self.is_sqlite:
            return False
        # Freed pages are zeroed already (`secure_delete`); what is left are their old copies in the write-ahead log.
        with self._explained(), self._engine.connect() as connection:
            raw: Any = connection.connection.driver_connection
            busy: int = raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            return busy == 0

    def close(self) -> None:
        """Close all connections."""
        if self._watcher is not None:
            self._watcher.close()
            self._watcher = None
        self._engine.dispose()

    def _current(self, engine: Engine) -> Engine:
        """`engine`, with connections of this process: those of a parent must not be used, nor closed, in its child."""
        if self._process != os.getpid():
            self._engine.dispose(close=False)
            self._process, self._watcher = os.getpid(), None
        return engine

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (SQLAlchemyError, sqlite3.Error) as error:
            raise _explain(error, self.shown) from error


def open_database(url: str | URL, *, create: bool, read_only: bool, new: Facts) -> tuple[Database, Facts]:
    """Open an index, or make an empty one.

    Args:
        url: `sqlite:///path` or `postgresql://...`.
        create: make it if it is not there.
        read_only: never write.
        new: what a new index is to say of itself, beside its schema.

    Returns:
        The database, and what it says of itself.

    Raises:
        ConfigError: not such a URL, or no driver for it.
        StoreError: missing, of another version or program, damaged, or not to be reached.
    """
    try:
        parsed = make_url(url)
    except ArgumentError:
        parsed = URL.create("none")
    if parsed.get_backend_name() not in ("sqlite", "postgresql") or not parsed.database:
        raise ConfigError(
            expected="a folder, or a URL such as postgresql://user@host/database",
            got=repr(str(url)[:80]),
            do="name the store's folder, or its database with --blobs for its files",
        )
    new = {"schema": str(SCHEMA), **new}
    if parsed.get_backend_name() == "sqlite" and not Path(parsed.database).exists():
        if not create or read_only:
            raise StoreError(
                expected="a prompt store",
                got=f"no {parsed.database!r}",
                do="check the path; `overture store add` or PromptStore(path) makes a store",
            )
        _make_file(Path(parsed.database), new)
    database = Database(parsed, read_only=read_only)
    try:
        if not database.is_sqlite and create and not read_only:
            _make_tables(database, new)
        return database, _read_facts(database)
    except BaseException:
        database.close()
        raise


def _read_facts(database: Database) -> Facts:
    with database.reading() as connection:
        if not sa.inspect(connection).has_table(facts.name):
            raise StoreError(
                expected="the index of a prompt store",
                got=f"{database.shown}, a database without its tables",
                do="check the path or URL",
            )
        found = {name: value for name, value in connection.execute(sa.select(facts.c.name, facts.c.value))}
    schema = found.get("schema", "")
    if schema != str(SCHEMA):
        newer = schema.isdecimal() and int(schema) > SCHEMA
        do = "upgrade overture" if newer else "restore the index from a backup"
        raise StoreError(expected=f"an index of schema {SCHEMA}", got=f"schema {schema!r} ({database.shown})", do=do)
    return found


def _make_file(path: Path, new: Facts) -> None:
    """Make a whole index under another name first: whoever finds one under `path` finds all of it."""
    temporary = path.with_name(f".{os.urandom(8).hex()}.tmp")
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        database = Database(URL.create("sqlite", database=str(temporary)), read_only=False)
        raw: Any
        with database._engine.connect() as connection:
            raw = connection.connection.driver_connection
            raw.execute("PRAGMA journal_mode=WAL")
        _make_tables(database, new)
        database.close()  # which writes the log into the file
        with suppress(FileExistsError):  # another process was first, and its index is as good
            # A link never replaces a file; Windows has no such rule for links but for renames.
            (os.rename if os.name == "nt" else os.link)(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise StoreError(
            expected="a folder in which a store can be made",
            got=f"{error.strerror} ({str(path.parent)!r})",
            do="check the path, its permissions and free space",
        ) from None
    finally:
        for end in ("", "-wal", "-shm"):
            Path(f"{temporary}{end}").unlink(missing_ok=True)


def _make_tables(database: Database, new: Facts) -> None:
    with database.writing() as connection:
        if not database.is_sqlite:
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK_OF_MAKING)))
        if sa.inspect(connection).has_table(facts.name):
            return
        metadata.create_all(connection)
        connection.execute(sa.insert(facts), [{"name": name, "value": value} for name, value in new.items()])


def _sqlite(url: URL, read_only: bool) -> Engine:
    path = Path(str(url.database)).absolute()
    mode = "mode=rw"
    if read_only:
        # A log needs a file to coordinate readers. Where none can be made, nobody can be writing either.
        alone = not os.access(path.parent, os.W_OK) and not Path(f"{path}-wal").exists()
        mode = "immutable=1" if alone else "mode=ro"

    def connect() -> sqlite3.Connection:
        # No transactions of the driver's own: `begin` below starts them, because a writer must ask for its lock first.
        connection = sqlite3.connect(
            f"file:{quote(str(path))}?{mode}",
            uri=True,
            timeout=_WAIT_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        for pragma in ("synchronous=FULL", "foreign_keys=ON", "secure_delete=ON", f"query_only={int(read_only)}"):
            connection.execute(f"PRAGMA {pragma}")
        return connection

    engine = sa.create_engine("sqlite://", creator=connect, poolclass=sa.QueuePool, pool_size=8, max_overflow=-1)

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that reads first and then writes would fail if another wrote in between.
        write = connection.get_execution_options().get("overture_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


def _postgresql(url: URL, read_only: bool) -> Engine:
    options = {"options": "-c default_transaction_read_only=on"} if read_only else {}
    try:
        return sa.create_engine(
            url.set(drivername="postgresql+psycopg"), pool_pre_ping=True, max_overflow=24, connect_args=options
        )
    except ImportError:
        raise ConfigError(
            expected="the driver psycopg for PostgreSQL",
            got="none installed",
            do="install it: pip install 'overture[postgres]'",
        ) from None


def _explain(error: Exception, shown: str) -> StoreError:
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    text = " ".join(str(cause).split())
    do = "check that the database is reachable, and its permissions and free space"
    if "locked" in text or "busy" in text:
        do = f"try again: another process has been writing for over {_WAIT_SECONDS} s"
    elif "not a database" in text or "malformed" in text:
        do = "check the path; if it is a store's index, restore it from a backup"
    return StoreError(expected="an index that can be read and written", got=f"{text[:300]} ({shown})", do=do)
