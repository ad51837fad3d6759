"""API keys: who may ask, kept as hashes in a small database of their own beside the store."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from overture.errors import ConfigError, StoreError
from overture.store.names import check_tenant

__all__ = ["FILE", "Caller", "Key", "KeyRing", "Role"]

FILE = "keys.sqlite"
"""Name of the database in a store's folder."""

_KEY = re.compile(r"ov-([0-9a-f]{12})-[A-Za-z0-9_-]{43}")
_NOBODY = bytes(32)
_LAYOUT = """create table if not exists keys (
    id text primary key, role text not null, tenant text, sha256 blob not null, created text not null) strict"""


class Role(StrEnum):
    """What a key opens."""

    TENANT = "tenant"
    """Answers, under the tenant's own prompts and shared ones."""
    ADMIN = "admin"
    """The routes below /admin, for all tenants, and /metrics."""
    METRICS = "metrics"
    """/metrics alone."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks."""

    role: Role | None
    """None where keys are not asked for: everything is open."""
    tenant: str | None = None
    """Whose prompts are meant; None for everybody's."""


@dataclass(frozen=True, slots=True)
class Key:
    """What is known of a key. The key itself is nowhere."""

    id: str
    """The part of the key that is no secret."""
    role: Role
    tenant: str | None
    created: datetime


class KeyRing:
    """The keys of a server. Any number of processes may add and remove keys; a running server knows at once.

    A key is `ov-`, 12 hexadecimal digits that name it, `-`, and 256 random bits. So much chance needs no slow hash.

    Args:
        path: the database; made if it is not there.

    Raises:
        StoreError: it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # Looking a key up waits for nobody, in this process or another, so it has a connection of its own.
        self._lock, self._looking = threading.Lock(), threading.Lock()
        try:
            # Made here and not by SQLite, whose files everybody may read.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            self._database = sqlite3.connect(path, timeout=10.0, isolation_level=None, check_same_thread=False)
            self._database.execute("pragma secure_delete = on")
            self._database.execute(_LAYOUT)
            self._reader = sqlite3.connect(path, timeout=0.0, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise StoreError(
                expected=f"a database of keys at {str(Path(path))!r}",
                got=str(error),
                do="check the path and its permissions",
            ) from None

    def close(self) -> None:
        """Close the database."""
        with self._lock, self._looking:
            self._database.close()
            self._reader.close()

    def add(self, role: Role, tenant: str | None = None) -> tuple[Key, str]:
        """Make a key.

        Args:
            role: what it opens.
            tenant: whose it is, for a tenant's key.

        Returns:
            What is known of it from now on, and the key, which is shown this once.

        Raises:
            ConfigError: a tenant's key without a tenant or the other way round, or a name that is not allowed.
            StoreError: the database cannot be written.
        """
        if (role is Role.TENANT) != (tenant is not None):
            raise ConfigError(
                expected="a tenant for a tenant's key, and none for others", got=repr(tenant), do="name whose key it is"
            )
        key = Key(secrets.token_hex(6), role, tenant and check_tenant(tenant), datetime.now(UTC))
        text = f"ov-{key.id}-{secrets.token_urlsafe(32)}"
        row = (key.id, key.role.value, key.tenant, _digest(text), key.created.isoformat())
        with self._lock, _explained():
            self._database.execute("insert into keys values (?, ?, ?, ?, ?)", row)
        return key, text

    def listed(self) -> list[Key]:
        """All keys: an administrator's, then those for metrics, then the tenants', the oldest first.

        Raises:
            StoreError: the database cannot be read.
        """
        with self._lock, _explained():
            rows = self._database.execute("select id, role, tenant, created from keys order by role, tenant, created")
            return [Key(id_, Role(role), tenant, datetime.fromisoformat(at)) for id_, role, tenant, at in rows]

    def remove(self, id_: str) -> bool:
        """Remove a key; it opens nothing from now on. Returns whether there was one.

        Raises:
            StoreError: the database cannot be written.
        """
        with self._lock, _explained():
            return bool(self._database.execute("delete from keys where id = ?", (id_,)).rowcount)

    def remove_tenant(self, tenant: str) -> int:
        """Remove all keys of a tenant. Returns how many there were.

        Raises:
            StoreError: the database cannot be written.
        """
        with self._lock, _explained():
            return self._database.execute("delete from keys where tenant = ?", (check_tenant(tenant),)).rowcount

    def caller(self, text: str) -> Caller | None:
        """Whose key it is; None if nobody's. The time it takes does not tell how much of a key was right.

        Raises:
            StoreError: the database cannot be read at this moment, as while another process writes it.
        """
        match = _KEY.fullmatch(text)
        with self._looking, _explained():
            found = self._reader.execute(
                "select role, tenant, sha256 from keys where id = ?", (match[1] if match else "",)
            ).fetchone()
        role, tenant, expected = found or ("", None, _NOBODY)
        same = hmac.compare_digest(_digest(text), expected)
        return Caller(Role(role), tenant) if same and found else None


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise StoreError(expected="a database of keys that is free", got=str(error), do="try again") from None


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
