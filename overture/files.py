"""Files that are either the old ones or the new ones, never half written."""

from __future__ import annotations

import os
import re
import secrets
from contextlib import suppress
from pathlib import Path

from overture.errors import OvertureError

__all__ = ["TEMPORARY", "remove_leftovers", "sync_folder", "write_atomically"]

TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp")
"""Names of files that are being written."""


def write_atomically(path: str | os.PathLike[str], data: bytes, *, mode: int = 0o666) -> None:
    """Put `data` under `path` so that a kill or a power cut leaves the old content or the new, never a mixture.

    Args:
        path: the file to make or to replace; its folder must exist.
        data: the whole content.
        mode: permissions of the file, less those that the user's umask takes away.

    Raises:
        OvertureError: the folder is missing or cannot be written, `path` is a folder, or the disk is full.
    """
    target = Path(path)
    # In the same folder, because a rename is atomic only within one file system.
    temporary = target.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        try:
            _write(temporary, data, mode)
            os.replace(temporary, target)
        except BaseException:  # an interrupt from the keyboard included
            with suppress(OSError, ValueError):
                temporary.unlink()
            raise
        sync_folder(target.parent)
    except (OSError, ValueError) as error:
        raise _explained(target, error) from None


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Delete what killed calls of `write_atomically` left in a folder that nobody else is writing to."""
    for path in Path(folder).iterdir():
        if TEMPORARY.fullmatch(path.name) and path.is_file():
            with suppress(OSError):
                path.unlink()


def _write(path: Path, data: bytes, mode: int) -> None:
    # Not `tempfile`: its files are readable by their owner only, whatever the user's umask says.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
    with open(descriptor, "wb", buffering=0) as file:
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) or 0 :]
        os.fsync(descriptor)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Write a folder's names to the disk: files made, renamed and deleted in it."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows: folders cannot be opened, and renames are journalled.
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explained(target: Path, error: OSError | ValueError) -> OvertureError:
    folder = target.parent
    if isinstance(error, FileNotFoundError):
        got, do = f"no folder {str(folder)!r}", "make the folder, or choose another path"
    elif isinstance(error, IsADirectoryError) or (isinstance(error, PermissionError) and target.is_dir()):
        got, do = f"a folder at {str(target)!r}", "choose another path, or add a file name to it"
    elif isinstance(error, NotADirectoryError):
        got, do = f"{str(folder)!r}, which is not a folder", "choose another path"
    else:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        got, do = f"{reason} while writing {str(target)!r}", "check permissions and free space, or choose another path"
    return OvertureError(expected="a path in a folder that can be written", got=got, do=do)
