"""Re-checking every file against the index, and finding files that no record needs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from overture.errors import PromptFileError, UnknownPromptError
from overture.formats import native
from overture.store import index
from overture.store.archive import Archive, Location
from overture.store.blobs import OWNER
from overture.store.records import Problem, Verification

__all__ = ["verify"]


def verify(archive: Archive, *, clean: bool) -> Verification:
    """Read every file that a record names, and list the others; `clean` deletes these."""
    # Files first, records second: what is new in between is then in the records, and not taken for a leftover.
    seen = {folder: archive.blobs.files(folder) for folder in archive.blobs.folders() if folder != OWNER}
    with archive.database.reading() as c:
        owners = index.all_tenants(c)
        versions = index.version_rows(c)
        states = [(owner, *row) for owner in owners for row in index.state_rows(c, owner.id)]
        needed = {owner.folder: index.files(c, owner.id) for owner in owners}
    leftovers = []
    located: list[Callable[[], Location | None]] = []
    located += [partial(archive.locate, row.tenant, row.name, row.version) for row in versions]
    located += [partial(archive.locate_state, owner.name, name) for owner, name, *_ in states]
    problems = [problem for locate in located if (problem := _problem(archive, locate))]
    for folder, files in sorted(seen.items()):
        known = {archive.file_name(file) for file in needed.get(folder, {})}
        surplus = sorted(files.keys() - known)
        if clean and (surplus or folder not in needed):
            surplus = _clean(archive, folder, surplus)
        leftovers += [f"{folder}/{file}" for file in surplus]
    return Verification(
        versions=len(versions),
        states=len(states),
        bytes=sum(size for files in needed.values() for size in files.values()),
        problems=tuple(problems),
        leftovers=tuple(leftovers),
        cleaned=clean,
    )


def _problem(archive: Archive, locate: Callable[[], Location | None]) -> Problem | None:
    """What is wrong with one record, if anything is and it was not removed or replaced meanwhile."""
    location = _now(locate)
    while location is not None:
        try:
            data = archive.read(location)
            if location.file[0] == "prompt":
                native.loads(data, location.address)
            return None
        except PromptFileError as error:
            before, location = location, _now(locate)
            if location == before:
                return Problem(address=before.address, expected=error.expected, got=error.got)
    return None


def _now(locate: Callable[[], Location | None]) -> Location | None:
    try:
        return locate()
    except UnknownPromptError:
        return None


def _clean(archive: Archive, folder: str, surplus: list[str]) -> list[str]:
    """Delete leftovers from a folder, looking again while nobody can write to it. Returns what was deleted."""
    with archive.writing() as c:
        owner = index.find_tenant(c, folder)
        if owner is None:
            archive.blobs.remove_folder(folder)
            return surplus
        known = {archive.file_name(file) for file in index.files(c, owner.id)}
        gone = [file for file in archive.blobs.files(folder) if file not in known]
        for file in gone:
            archive.blobs.remove(folder, file)
            index.remove_garbage(c, folder, file)
        return sorted(gone)
