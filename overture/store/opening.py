"""Opening a store: its index, its files, its key, and whether they belong together."""

from __future__ import annotations

import secrets
from pathlib import Path

from sqlalchemy.engine import URL

from overture.errors import ConfigError, StoreError
from overture.files import TEMPORARY
from overture.store.archive import Archive, check_key
from overture.store.blobs import OWNER, Blobs, open_blobs
from overture.store.database import open_database
from overture.store.sealing import Key

__all__ = ["open_archive"]

INDEX, BLOBS = "index.sqlite", "blobs"
"""Names in a store's folder."""


def open_archive(location: str, blobs: str | None, key: Key | None, *, read_only: bool, create: bool) -> Archive:
    """Open or make an index and the place of its files, and check that they belong together and to the key.

    The arguments and errors are those of `PromptStore`.
    """
    url: str | URL = location
    if "://" not in location:
        root = Path(location)
        url, blobs = URL.create("sqlite", database=str(root / INDEX)), blobs or str(root / BLOBS)
        if create and not read_only:
            _make_folder(root)
    if not blobs:
        raise ConfigError(
            expected="a place for the files of a store with a database",
            got="no blobs",
            do="name one that all machines reach, such as blobs='s3://bucket/prompts'",
        )
    new = {"key": key.id if key else "", "removals": "0", "id": secrets.token_hex(16)}
    database, facts = open_database(url, create=create, read_only=read_only, new=new)
    try:
        check_key(facts["key"], key)
        files = open_blobs(blobs, read_only=read_only)
        _check_owner(files, facts["id"], blobs, read_only)
        archive = Archive(database, files, key, read_only=read_only)
        if not read_only:
            archive.collect()  # what a killed removal left
    except BaseException:
        database.close()
        raise
    return archive


def _make_folder(root: Path) -> None:
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            expected="a folder for the store", got=f"{error.strerror} ({str(root)!r})", do="check the path"
        ) from None


def _check_owner(blobs: Blobs, id_: str, shown: str, read_only: bool) -> None:
    """Files say which index they belong to: cleaning with another one would delete them all."""
    # Folders first: whoever makes one has said before whose it is.
    taken = set(blobs.folders()) - {OWNER}
    owners = [name for name in blobs.files(OWNER) if not TEMPORARY.fullmatch(name)]
    if not owners and not taken and not read_only:
        blobs.write(OWNER, id_, b"The files here belong to the prompt store of this name.\n")
    elif id_ not in owners:
        raise StoreError(
            expected=f"the files of this store (id {id_[:8]}) in {shown!r}",
            got=f"those of another (id {', '.join(o[:8] for o in owners)})" if owners else "files of no store",
            do="name the place where this store's files are",
        )
