"""Prompts in and out of a store: exports, folders of prompt files, and the layout of a Hub repository.

An export is for people as well: `TENANT/NAME/VERSION.safetensors`, and `store.json` with all that the index said. It
holds no optimizer states and is never encrypted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from overture.errors import ConfigError, PromptFileError, UnknownPromptError
from overture.files import write_atomically
from overture.formats import native
from overture.prompt import SoftPrompt, VirtualTokens
from overture.store import changes
from overture.store.archive import Archive, NewVersion, sha256_of
from overture.store.names import check_name, check_tenant, folder_name
from overture.store.records import Record

__all__ = ["HUB_FILE", "described", "export", "import_folder", "push", "read_file"]

HUB_FILE = "prompt.safetensors"
"""The prompt of a Hub repository."""
_MANIFEST = "store.json"
_FORMAT, _SCHEMA = "overture.store_export", 1


def described(
    data: bytes, prompt: SoftPrompt, metadata: Mapping[str, Any], metrics: Mapping[str, Any] | None, created: datetime
) -> NewVersion:
    """A prompt file, and what the index is to say of it."""
    return NewVersion(
        data=data,
        kind="virtual_tokens" if isinstance(prompt.value, VirtualTokens) else "kv_prefix",
        num_virtual_tokens=prompt.length,
        base=prompt.base,
        metadata=metadata,
        metrics=prompt.metrics if metrics is None else metrics,
        created=created,
    )


def read_file(path: Path) -> tuple[bytes, SoftPrompt]:
    """A prompt file, checked in full."""
    native.peek(path)  # refuses what is no prompt file before it is read whole
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PromptFileError(
            expected="a file that can be read", got=f"{error.strerror} ({str(path)!r})", do="check its permissions"
        ) from None
    return data, native.loads(data, str(path))


def export(archive: Archive, folder: Path, tenant: str | None) -> int:
    """Write all versions to a new folder; the manifest comes last, so that an export without one is not finished."""
    _make_empty(folder)
    names = {(record.tenant, record.name) for record in archive.records(tenant, all_versions=False)}
    records = [record for owner, name in sorted(names) for record in _export_name(archive, folder, owner, name)]
    manifest = {"format": _FORMAT, "schema": _SCHEMA, "records": [record.as_dict() for record in records]}
    text = json.dumps(manifest, ensure_ascii=False, indent=1)
    write_atomically(folder / _MANIFEST, text.encode(), mode=0o600)
    return len(records)


def _export_name(archive: Archive, folder: Path, tenant: str, name: str) -> list[Record]:
    """Write a name's versions as they are at one moment, also while others change it; none if it was removed."""
    while True:
        records = archive.records(tenant, name, all_versions=True)
        try:
            files = {record.version: archive.content(tenant, name, record.version) for record in records}
        except (PromptFileError, UnknownPromptError):
            if archive.records(tenant, name, all_versions=True) == records:
                raise
            continue
        home = folder / folder_name(tenant) / folder_name(name)
        for version, data in files.items():
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(home / f"{version}.safetensors", data, mode=0o600)
        return records


def import_folder(archive: Archive, folder: Path, tenant: str | None) -> int:
    """Take in an export, or prompt files, name by name."""
    if (folder / _MANIFEST).exists():
        return _import_export(archive, folder, tenant)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(
            expected=f"an export with its {_MANIFEST}, or a folder of prompt files",
            got=f"{str(folder)!r}, which is neither",
            do="check the path; an export without the file was cut short: export again",
        )
    if tenant is None:
        raise ConfigError(expected="a tenant for a folder of prompt files", got="none", do="name one: --tenant acme")
    now = datetime.now(UTC)
    count = 0
    for path in files:
        data, prompt = read_file(path)
        name = check_name(path.stem)
        if not any(record.sha256 == sha256_of(data) for record in archive.records(tenant, name, all_versions=True)):
            changes.publish(archive, tenant, name, described(data, prompt, {}, None, now))
            count += 1
    return count


def push(archive: Archive, tenant: str, name: str, version: int | None, folder: Path) -> Record:
    """Write a version as a Hub repository."""
    from overture.formats.hub import model_card

    record = archive.record(tenant, name, version)
    data = archive.content(tenant, name, record.version)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / HUB_FILE, data)
    if not (folder / "README.md").exists():  # a card that somebody wrote stays
        write_atomically(folder / "README.md", model_card(native.loads(data, str(record))).encode())
    return record


def _import_export(archive: Archive, folder: Path, tenant: str | None) -> int:
    names: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in _manifest(folder):
        names.setdefault((entry["tenant"], entry["name"]), []).append(entry)
    owners = {owner for owner, _ in names}
    if tenant is not None and len(owners) > 1:
        raise ConfigError(
            expected="an export of one tenant, to import it as another",
            got=f"one of {len(owners)}",
            do="leave the tenant out, or export that tenant alone",
        )
    count = 0
    for (owner, name), entries in names.items():
        versions = {entry["version"]: _read_exported(folder, entry) for entry in entries}
        current = next(entry for entry in entries if entry["current"])
        target = check_tenant(owner) if tenant is None else tenant
        count += changes.restore(archive, target, check_name(name), versions, current["version"], current["pinned"])
    return count


def _manifest(folder: Path) -> list[dict[str, Any]]:
    """The records of an export, with every field that is used later and a current version for each name."""
    path = folder / _MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT:
            raise ValueError(f"format {manifest['format']!r}")
        if manifest["schema"] != _SCHEMA:
            raise PromptFileError(
                expected=f"an export of schema {_SCHEMA}", got=f"schema {manifest['schema']}", do="upgrade overture"
            )
        current: dict[tuple[str, str], int] = {}
        for entry in manifest["records"]:
            name = entry["tenant"], entry["name"]
            current[name] = current.get(name, 0) + (entry["current"] is True)
            if type(entry["version"]) is not int or entry["version"] < 1 or type(entry["pinned"]) is not bool:
                raise ValueError(f"version {entry['version']!r} of {name}")
            entry["created"] = datetime.fromisoformat(entry["created"])
            entry["metadata"], entry["metrics"] = dict(entry["metadata"]), dict(entry["metrics"])
        if set(current.values()) - {1}:
            raise ValueError("a name with no current version, or with several")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PromptFileError(
            expected="the manifest of an export", got=f"{error} ({path})", do="export again, or restore the file"
        ) from None
    records: list[dict[str, Any]] = manifest["records"]
    return records


def _read_exported(folder: Path, entry: dict[str, Any]) -> NewVersion:
    # The path comes from the names, not from the manifest: a stranger's manifest cannot point elsewhere.
    path = folder / folder_name(entry["tenant"]) / folder_name(entry["name"]) / f"{entry['version']}.safetensors"
    data, prompt = read_file(path)
    if sha256_of(data) != entry["sha256"]:
        raise PromptFileError(
            expected=f"the sha256 {str(entry['sha256'])[:12]}... that the manifest gives",
            got=f"{sha256_of(data)[:12]}... ({path})",
            do="export again, or restore the file",
        )
    return described(data, prompt, entry["metadata"], entry["metrics"], entry["created"])


def _make_empty(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        got = f"{str(folder)!r}, which is not empty" if any(folder.iterdir()) else ""
    except OSError as error:
        got = f"{error.strerror} ({str(folder)!r})"
    if got:
        raise ConfigError(expected="a new or empty folder to export to", got=got, do="choose another folder")
