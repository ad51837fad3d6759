"""What is on the disk: the index and the files, kept together through kills, power cuts and many writers.

The order of things makes it so. A file is written before the record that names it, in the transaction that makes the
record and holds the tenant's lock; it is deleted after the last record that names it, in a later transaction that holds
the same lock and looks again. So a record never names a file that is not there, a file that comes back is never deleted
by a late remover, and whoever holds a tenant's lock knows that nobody is writing into its folder.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy.engine import Connection

from overture.errors import ConfigError, PromptFileError, StoreError, UnknownPromptError
from overture.prompt import BaseModelId
from overture.store import index
from overture.store.blobs import Blobs
from overture.store.database import Database
from overture.store.records import Record
from overture.store.sealing import Key

__all__ = ["Archive", "Location", "NewVersion", "check_key", "sha256_of"]

_SUFFIXES = {"prompt": ".safetensors", "state": ".state"}
_SEALED = ".sealed"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Location:
    """Where a record's content lies, and what it must be."""

    address: str
    """TENANT/NAME@VERSION, for messages."""
    folder: str
    file: index.File
    key: bytes | None
    """The tenant's own key, sealed with the store's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewVersion:
    """A version to be stored."""

    data: bytes
    """The prompt file."""
    kind: str
    num_virtual_tokens: int
    base: BaseModelId
    metadata: Mapping[str, Any]
    metrics: Mapping[str, Any]
    created: datetime


class Archive:
    """Records and their files. Knows bytes, not tensors.

    Args:
        database: the index.
        blobs: the files.
        key: the store's key, or None if it is not encrypted.
        read_only: refuse every change.
    """

    def __init__(self, database: Database, blobs: Blobs, key: Key | None, *, read_only: bool = False) -> None:
        self.database, self.blobs, self.key, self.read_only = database, blobs, key, read_only
        self._tenant_keys: dict[str, Key] = {}

    def collect(self, folder: str | None = None) -> None:
        """Delete what removals left to be deleted, of one folder or of all."""
        with self.database.reading() as c:
            waiting = index.garbage_of(c, folder)
        try:
            for home in sorted({home for home, _ in waiting}):
                self._collect_folder(home, whole=(home, "") in waiting)
        except OSError as error:
            raise StoreError(
                expected="removed records' files to be deleted",
                got=f"{error.strerror or error}",
                do="check the permissions of the store's files; they are deleted when the store is next opened",
            ) from None

    def _collect_folder(self, home: str, *, whole: bool) -> None:
        if whole:
            # Its tenant is gone, so nobody can be writing there.
            self.blobs.remove_folder(home)
        with self.writing() as c:
            if not whole and index.find_tenant(c, home) is None:
                return  # erased meanwhile, by somebody who deletes the whole folder
            # Under the tenant's lock once more: what was published again meanwhile is garbage no more.
            for _, file in index.garbage_of(c, home):
                if not whole:
                    self.blobs.remove(home, file)
                index.remove_garbage(c, home, file)

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that may change the index."""
        if self.read_only:
            raise ConfigError(
                expected="a store that is open for writing",
                got="one opened with read_only=True",
                do="open it without read_only",
            )
        with self.database.writing() as c:
            yield c

    @contextmanager
    def locking(self, tenant: str) -> Iterator[tuple[Connection, index.Tenant | None]]:
        """A transaction in which nobody else changes anything of a tenant, if there is one."""
        with self.writing() as c:
            yield c, index.tenant(c, tenant, lock=True)

    @contextmanager
    def making(self, tenant: str) -> Iterator[tuple[Connection, index.Tenant]]:
        """The same, with a tenant that is made if it is not there."""
        while True:
            self._make(tenant)
            with self.locking(tenant) as (c, owner):
                if owner is not None:
                    yield c, owner
                    return
            # Erased between the two transactions: begin again.

    @contextmanager
    def existing(self, tenant: str, name: str) -> Iterator[tuple[Connection, index.Tenant, index.Prompt]]:
        """The same, for a name that is there.

        Raises:
            UnknownPromptError: it is not.
        """
        with self.locking(tenant) as (c, owner):
            prompt = index.prompt(c, owner.id, name) if owner else None
            if owner is None or prompt is None:
                raise self.unknown(c, tenant, name, None)
            yield c, owner, prompt

    # Reading

    def locate(self, tenant: str, name: str, version: int | None) -> Location:
        """Where a version lies, the current one if None.

        Raises:
            UnknownPromptError: there is no such tenant, name or version.
        """
        with self.database.reading() as c:
            row = index.version(c, tenant, name, version)
            if row is None:
                raise self.unknown(c, tenant, name, version)
        return Location(f"{tenant}/{name}@{row.version}", row.folder, ("prompt", row.sha256), row.key)

    def read(self, location: Location) -> bytes | memoryview:
        """A record's content, after a check that it is what was stored.

        Raises:
            PromptFileError: it is missing or damaged.
            StoreError: it does not open with the tenant's key.
        """
        kind, sha256 = location.file
        try:
            data = self.blobs.read(location.folder, self.file_name(location.file))
        except FileNotFoundError:
            raise self._damaged(location.address, "no file") from None
        except OSError as error:
            raise self._damaged(location.address, f"{error.strerror or error}") from None
        if location.key is not None:
            key = self.tenant_key(location.folder, location.key)
            try:
                data = key.open(data, f"{kind}/{location.folder}/{sha256}")
            except StoreError as error:
                raise self._damaged(location.address, error.got) from None
        found = sha256_of(data)
        if found != sha256:
            raise self._damaged(location.address, f"a file with {found[:12]}..., so it was damaged or edited", sha256)
        return data

    def content(self, tenant: str, name: str, version: int) -> bytes:
        """The prompt file of a version."""
        return bytes(self.read(self.locate(tenant, name, version)))

    def state(self, tenant: str, name: str) -> bytes | None:
        """The optimizer state of a name, if there is one."""
        location = self.locate_state(tenant, name)
        while location is not None:
            try:
                return bytes(self.read(location))
            except PromptFileError:
                # Perhaps it was replaced a moment ago, and its file deleted.
                again = self.locate_state(tenant, name)
                if again == location:
                    raise
                location = again
        return None

    def locate_state(self, tenant: str, name: str) -> Location | None:
        """Where the optimizer state of a name lies, if there is one."""
        with self.database.reading() as c:
            owner = index.tenant(c, tenant)
            rows = index.state_rows(c, owner.id, name) if owner else []
        if owner is None or not rows:
            return None
        return Location(f"{tenant}/{name}", owner.folder, ("state", rows[0][1]), owner.key)

    def records(self, tenant: str | None, name: str | None = None, *, all_versions: bool) -> list[Record]:
        """Versions by tenant, name and number."""
        with self.database.reading() as c:
            rows = index.version_rows(c, tenant, name, all_versions=all_versions)
        return [self._record(row) for row in rows]

    def record(self, tenant: str, name: str, version: int | None = None) -> Record:
        """One version, by default the current one.

        Raises:
            UnknownPromptError: there is no such tenant, name or version.
        """
        with self.database.reading() as c:
            row = index.version(c, tenant, name, version)
            if row is None:
                raise self.unknown(c, tenant, name, version)
        return self._record(row)

    def _record(self, row: index.Stored) -> Record:
        details = row.details
        if row.key is not None:
            details = self.tenant_key(row.folder, row.key).open(details, _label(row.folder, row.name, row.version))
        current = bool(row.version == row.current)
        return Record(
            tenant=row.tenant,
            name=row.name,
            version=row.version,
            current=current,
            pinned=current and bool(row.pinned),
            sha256=row.sha256,
            size=row.size,
            kind=row.kind,
            num_virtual_tokens=row.num_virtual_tokens,
            base=BaseModelId(architecture=row.architecture, digest=row.digest, name=row.base_name),
            created=_EPOCH + timedelta(microseconds=row.created),
            **json.loads(details.decode()),
        )

    @property
    def encrypted(self) -> bool:
        """True if files and details are sealed."""
        return self.key is not None

    def file_name(self, file: index.File) -> str:
        """How a file is called in its tenant's folder."""
        kind, sha256 = file
        return sha256 + _SUFFIXES[kind] + (_SEALED if self.encrypted else "")

    @staticmethod
    def _damaged(address: str, got: str, sha256: str = "") -> PromptFileError:
        """The error for a record whose content is not what was stored."""
        what = f" with the sha256 {sha256[:12]}..." if sha256 else ""
        do = "`overture store verify` shows all such records; publish the prompt again or restore the file"
        return PromptFileError(expected=f"the file of {address}{what}", got=got, do=do)

    # For changes, within their transaction

    def _make(self, tenant: str) -> None:
        """Make the tenant in a transaction of its own, so that no file lies in a folder unknown to the index."""
        with self.database.reading() as c:
            if index.tenant(c, tenant) is not None:
                return
        folder = secrets.token_hex(16)
        with self.writing() as c:
            sealed = None
            if self.key is not None:
                check_key(index.fact(c, "key", lock=True), self.key)  # it may have been rotated by another process
                sealed = self.key.seal(Key.random().secret, f"key/{folder}")
            index.add_tenant(c, tenant, folder, sealed)

    def add(self, c: Connection, owner: index.Tenant, prompt: index.Prompt, number: int, new: NewVersion) -> None:
        """Write a version's file, and then its record."""
        sha256 = self.write(c, owner, "prompt", new.data)
        details = _encoded({"metadata": new.metadata, "metrics": new.metrics})
        if owner.key is not None:
            key = self.tenant_key(owner.folder, owner.key)
            details = key.seal(details, _label(owner.folder, prompt.name, number))
        row = index.Version(
            sha256=sha256,
            size=len(new.data),
            kind=new.kind,
            num_virtual_tokens=new.num_virtual_tokens,
            architecture=new.base.architecture,
            digest=new.base.digest,
            base_name=new.base.name,
            created=(new.created - _EPOCH) // timedelta(microseconds=1),
            details=details,
        )
        index.add_version(c, prompt.id, number, row)

    def write(self, c: Connection, owner: index.Tenant, kind: str, data: bytes) -> str:
        """Write a file. Returns its SHA-256, for the record to come."""
        sha256 = sha256_of(data)
        if owner.key is not None:
            data = self.tenant_key(owner.folder, owner.key).seal(data, f"{kind}/{owner.folder}/{sha256}")
        file = self.file_name((kind, sha256))
        index.remove_garbage(c, owner.folder, file)
        self.blobs.write(owner.folder, file, data)
        return sha256

    def discard(self, c: Connection, owner: index.Tenant, before: Mapping[index.File, int]) -> list[str]:
        """Note for deletion what no record of the tenant needs any more. Returns the files' names."""
        gone = sorted(self.file_name(file) for file in before.keys() - index.files(c, owner.id).keys())
        for name in gone:
            index.add_garbage(c, owner.folder, name)
        return gone

    def unknown(self, c: Connection, tenant: str, name: str, version: int | None) -> UnknownPromptError:
        """The error for what is not there; the same for a tenant that does not exist as for one without the name."""
        from difflib import get_close_matches

        owner = index.tenant(c, tenant)
        there = index.names(c, owner.id) if owner else []
        if name in there:
            numbers = [row.version for row in index.version_rows(c, tenant, name)]
            got, do = f"no version {version}", f"choose one of {', '.join(map(str, numbers[-10:]))}"
            return UnknownPromptError(expected=f"a version of {tenant}/{name}", got=got, do=do)
        near = get_close_matches(name, there, n=3, cutoff=0.6)
        do = f"check the name; there is {' and '.join(near)}" if near else "`overture store ls` shows what there is"
        return UnknownPromptError(expected=f"a prompt of the tenant {tenant!r}", got=f"no prompt {name!r}", do=do)

    def forget_key(self, folder: str) -> None:
        """Drop a tenant's own key from memory."""
        self._tenant_keys.pop(folder, None)

    def tenant_key(self, folder: str, sealed: bytes | None) -> Key:
        """A tenant's own key, unwrapped. It is as old as its folder, so a rotation does not change it."""
        assert sealed is not None
        found = self._tenant_keys.get(folder)
        if found is None:
            if self.key is None:
                raise StoreError(expected="a store without encryption", got="a tenant with a key", do=_RESTORE)
            try:
                found = Key(self.key.open(sealed, f"key/{folder}"))
            except StoreError:
                with self.database.reading() as c:
                    check_key(index.fact(c, "key"), self.key)
                raise StoreError(expected="a tenant's key as it was sealed", got="a damaged one", do=_RESTORE) from None
            self._tenant_keys[folder] = found
        return found


_RESTORE = "restore the index from a backup"


def check_key(wanted: str, key: Key | None) -> None:
    """Raise `StoreError` unless `key` is the one with the id `wanted` (empty for none)."""
    if wanted == (key.id if key else ""):
        return
    if not wanted:
        do = "open it without a key; to encrypt it, export it and import the export into a new store made with the key"
        raise StoreError(expected="no key, because this store is not encrypted", got=f"the key {_of(key)}", do=do)
    raise StoreError(
        expected=f"the key {wanted} that this store is encrypted with",
        got=f"the key {_of(key)}" if key else "none",
        do="set OVERTURE_STORE_KEY or OVERTURE_STORE_KEY_FILE to it; it may have been rotated",
    )


def _of(key: Key | None) -> str:
    return key.id if key else ""


def _label(folder: str, name: str, version: int) -> str:
    return f"details/{folder}/{version}/{name}"


def sha256_of(data: bytes | memoryview) -> str:
    """The address of a content."""
    return hashlib.sha256(data).hexdigest()


def _encoded(details: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps({key: dict(value) for key, value in details.items()}, ensure_ascii=False, allow_nan=False)
        return text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            expected="metadata and metrics that JSON can hold",
            got=str(error)[:120],
            do="use strings, finite numbers, booleans, lists and dictionaries",
        ) from None
