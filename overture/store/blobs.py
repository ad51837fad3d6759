"""Where files lie: a folder of this machine, or any place `fsspec` reaches. One folder per tenant."""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from overture.errors import ConfigError, StoreError
from overture.files import sync_folder, write_atomically

__all__ = ["OWNER", "Blobs", "LocalBlobs", "RemoteBlobs", "open_blobs"]

OWNER = ".store"
"""Folder that says which index the files belong to."""


@runtime_checkable
class Blobs(Protocol):
    """Files in folders. A file is whole or absent; a tenant's files lie in one folder and in no other."""

    def write(self, folder: str, file: str, data: bytes) -> None:
        """Put a file; it is safe on the disk when this returns."""

    def read(self, folder: str, file: str) -> bytes | memoryview:
        """The file's bytes. Raises `FileNotFoundError`."""

    def remove(self, folder: str, file: str) -> None:
        """Delete a file if it is there."""

    def files(self, folder: str) -> dict[str, int]:
        """Bytes of every file in a folder, half-written ones included; empty if there is no folder."""

    def folders(self) -> list[str]:
        """All folders."""

    def remove_folder(self, folder: str) -> None:
        """Delete a folder with all that is in it."""


class LocalBlobs:
    """Files below a folder of this machine, readable by their owner only."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = Path(root)

    def write(self, folder: str, file: str, data: bytes) -> None:
        """Write the file next to its place and rename it there."""
        home = self._root / folder
        if not home.is_dir():
            home.mkdir(mode=0o700, exist_ok=True)
            sync_folder(self._root)
        write_atomically(home / file, data, mode=0o600)

    def read(self, folder: str, file: str) -> bytes | memoryview:
        """The file, mapped: no lock, no copy, and a file deleted meanwhile stays readable here."""
        with open(self._root / folder / file, "rb") as stream:
            if os.fstat(stream.fileno()).st_size == 0:  # which cannot be mapped
                return b""
            return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))

    def remove(self, folder: str, file: str) -> None:
        """Delete a file."""
        with suppress(FileNotFoundError):
            (self._root / folder / file).unlink()
            sync_folder(self._root / folder)

    def files(self, folder: str) -> dict[str, int]:
        """Bytes of every file."""
        found: dict[str, int] = {}
        try:
            with os.scandir(self._root / folder) as entries:
                for entry in entries:
                    found[entry.name] = entry.stat(follow_symlinks=False).st_size
        except FileNotFoundError:  # the folder, or a file that was being replaced
            pass
        return found

    def folders(self) -> list[str]:
        """All folders."""
        return sorted(entry.name for entry in os.scandir(self._root) if entry.is_dir(follow_symlinks=False))

    def remove_folder(self, folder: str) -> None:
        """Delete a folder."""
        # Twice, because a writer that is still at it may add a file between the listing and the folder's removal.
        for _ in range(2):
            shutil.rmtree(self._root / folder, ignore_errors=True)
        if (self._root / folder).exists():
            shutil.rmtree(self._root / folder)  # now say why it cannot be done
        sync_folder(self._root)


class RemoteBlobs:
    """Files in an `fsspec` file system, such as `s3://bucket/prompts`.

    Object stores put a file whole or not at all. On others a killed writer may leave a part of a file; no record names
    it, because a record is made after its file, and the next write of the file replaces it.
    """

    def __init__(self, filesystem: Any, root: str) -> None:
        self._fs, self._root = filesystem, root.rstrip("/")

    def write(self, folder: str, file: str, data: bytes) -> None:
        """Put the object, unless it is there whole."""
        path = self._path(folder, file)
        # A whole file is never written again: where writes are not atomic, its readers would see a part.
        with self._reaching():
            if self._size(path) != len(data):
                self._fs.makedirs(f"{self._root}/{folder}", exist_ok=True)
                self._fs.pipe_file(path, data)

    def read(self, folder: str, file: str) -> bytes | memoryview:
        """The whole object."""
        data: bytes = self._fs.cat_file(self._path(folder, file))
        return data

    def remove(self, folder: str, file: str) -> None:
        """Delete an object."""
        with self._reaching(), suppress(FileNotFoundError):
            self._fs.rm_file(self._path(folder, file))

    def files(self, folder: str) -> dict[str, int]:
        """Bytes of every object in a folder."""
        return {_last(e["name"]): e["size"] for e in self._list(f"{self._root}/{folder}") if e["type"] == "file"}

    def folders(self) -> list[str]:
        """All folders."""
        return sorted(_last(e["name"]) for e in self._list(self._root) if e["type"] == "directory")

    def remove_folder(self, folder: str) -> None:
        """Delete all objects of a folder."""
        path = f"{self._root}/{folder}"
        with self._reaching():
            if self._fs.exists(path):
                self._fs.rm(path, recursive=True)

    def _path(self, folder: str, file: str) -> str:
        return f"{self._root}/{folder}/{file}"

    def _size(self, path: str) -> int | None:
        try:
            size: int = self._fs.info(path)["size"]
        except FileNotFoundError:
            return None
        return size

    def _list(self, path: str) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = []
        with self._reaching(), suppress(FileNotFoundError):
            listed = self._fs.ls(path, detail=True, refresh=True)
        return listed

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # fsspec's way to say whatever went wrong
            raise StoreError(
                expected=f"files that can be reached at {self._root!r}",
                got=f"{type(error).__name__}: {error}",
                do="check the address, its credentials and permissions, and the network",
            ) from error


def open_blobs(url: str, *, read_only: bool = False) -> Blobs:
    """The files at a path or an `fsspec` URL.

    Raises:
        ConfigError: the URL's protocol is not known, not installed, or keeps copies of its own.
        StoreError: a local folder is missing (`read_only`) or cannot be made.
    """
    protocol, separator, rest = url.partition("://")
    if not separator or protocol in ("file", "local"):
        return _open_local(Path(rest if separator else url), read_only=read_only)
    if "cache" in protocol:
        raise ConfigError(
            expected="blobs without a cache of fsspec in front",
            got=repr(protocol),
            do="leave it out: copies it kept would outlive the erasure of a user; the store has a memory tier",
        )
    import fsspec

    try:
        # Listings must be true at every moment: an erasure removes what is listed.
        filesystem, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            expected="a folder, or a URL that fsspec can open",
            got=f"{url!r}: {error}",
            do="check the URL; s3:// needs `pip install s3fs`, gs:// `gcsfs`, az:// `adlfs`",
        ) from None
    return RemoteBlobs(filesystem, root)


def _open_local(root: Path, *, read_only: bool) -> LocalBlobs:
    try:
        if not read_only:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if root.is_dir():
            return LocalBlobs(root)
        got = f"{str(root)!r}, which is not a folder" if root.exists() else f"no folder {str(root)!r}"
    except OSError as error:
        got = f"{error.strerror} ({str(root)!r})"
    raise StoreError(expected="a folder for the store's files", got=got, do="check the path and its permissions")


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]
