"""Every change of a store, each of them all or nothing: one transaction under the tenant's lock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from overture.errors import ConfigError, StoreError
from overture.store import index
from overture.store.archive import Archive, NewVersion, check_key, sha256_of
from overture.store.records import Removed
from overture.store.sealing import Key

__all__ = [
    "erase",
    "pin",
    "publish",
    "put_state",
    "remove",
    "remove_state",
    "restore",
    "roll_back",
    "rotate_key",
    "unpin",
]


def publish(archive: Archive, tenant: str, name: str, new: NewVersion) -> int:
    """Store the next version of a name. Returns its number; from then on it is on the disk."""
    with archive.making(tenant) as (c, owner):
        prompt = index.prompt(c, owner.id, name) or index.add_prompt(c, owner.id, name)
        number = prompt.last + 1
        archive.add(c, owner, prompt, number, new)
        index.change_prompt(c, prompt.id, last=number, current=prompt.current if prompt.pinned else number)
        return number


def restore(
    archive: Archive, tenant: str, name: str, versions: Mapping[int, NewVersion], current: int, pinned: bool
) -> int:
    """Store versions under numbers they had elsewhere, all or none.

    Returns:
        How many were new. What is there already stays, and so does what an existing name stands for.

    Raises:
        ConfigError: the name has another content under one of the numbers.
    """
    with archive.making(tenant) as (c, owner):
        prompt = index.prompt(c, owner.id, name)
        here = {row.version: row.sha256 for row in index.version_rows(c, tenant, name)}
        for number, new in versions.items():
            if number in here and here[number] != sha256_of(new.data):
                raise ConfigError(
                    expected=f"{tenant}/{name}@{number} to be what is imported, or not there",
                    got="another prompt under this number",
                    do="import under another tenant, or remove the name first",
                )
        missing = {number: new for number, new in versions.items() if number not in here}
        if not missing:
            return 0
        if prompt is None:
            prompt = index.add_prompt(c, owner.id, name)
            index.change_prompt(c, prompt.id, current=current, pinned=pinned)
        for number, new in missing.items():
            archive.add(c, owner, prompt, number, new)
        index.change_prompt(c, prompt.id, last=max(prompt.last, *missing))
        return len(missing)


def pin(archive: Archive, tenant: str, name: str, version: int | None) -> None:
    """Let a name stand for a version, the current one if None, and stay there."""
    with archive.existing(tenant, name) as (c, _, prompt):
        if version is not None and index.version(c, tenant, name, version) is None:
            raise archive.unknown(c, tenant, name, version)
        index.change_prompt(c, prompt.id, current=version or prompt.current, pinned=True)


def unpin(archive: Archive, tenant: str, name: str) -> None:
    """Let a name follow what is published from now on."""
    with archive.existing(tenant, name) as (c, _, prompt):
        index.change_prompt(c, prompt.id, pinned=False)


def roll_back(archive: Archive, tenant: str, name: str, to: int | None) -> None:
    """Let a name stand for an earlier version: `to`, or the one before the current."""
    with archive.existing(tenant, name) as (c, _, prompt):
        numbers = [row.version for row in index.version_rows(c, tenant, name)]
        earlier = [number for number in numbers if number < prompt.current]
        if prompt.pinned:
            raise ConfigError(
                expected=f"{tenant}/{name} not to be pinned",
                got=f"a pin on version {prompt.current}",
                do="pin the other version instead, or unpin first",
            )
        if to is not None and to not in numbers:
            raise archive.unknown(c, tenant, name, to)
        if to is None and not earlier:
            raise ConfigError(
                expected=f"a version of {tenant}/{name} before {prompt.current}",
                got="none",
                do="name the version to go to; `overture store ls` shows them",
            )
        index.change_prompt(c, prompt.id, current=earlier[-1] if to is None else to)


def remove(archive: Archive, tenant: str, name: str, version: int | None) -> Removed:
    """Remove a name with all versions and its state, or one version.

    Raises:
        UnknownPromptError: there is no such name or version.
        ConfigError: the version is what the name stands for, and there are others.
    """
    with archive.existing(tenant, name) as (c, owner, prompt):
        before = index.files(c, owner.id)
        numbers = [row.version for row in index.version_rows(c, tenant, name)]
        states = len(index.state_rows(c, owner.id, name))
        if version is not None and version not in numbers:
            raise archive.unknown(c, tenant, name, version)
        if version is None or numbers == [version]:
            index.delete_prompt(c, owner.id, prompt)
            removed = Removed(tenant=tenant, prompts=(name,), versions=len(numbers), states=states)
        elif version == prompt.current:
            raise ConfigError(
                expected=f"a version that {tenant}/{name} does not stand for",
                got=f"version {version}, the current one",
                do="roll back or pin another version first, or remove the whole name",
            )
        else:
            index.delete_version(c, prompt.id, version)
            removed = Removed(tenant=tenant, versions=1)
        gone = archive.discard(c, owner, before)
        index.count_removal(c)
    sizes = archive.blobs.files(owner.folder)
    archive.collect(owner.folder)
    there = [sizes[name] for name in gone if name in sizes]
    return replace(removed, files=len(there), bytes=sum(there), scrubbed=archive.database.forget())


def erase(archive: Archive, tenant: str) -> Removed:
    """Remove everything of a tenant from the index and the disk; nothing to remove is no error."""
    with archive.locking(tenant) as (c, owner):
        if owner is None:
            return Removed(tenant=tenant)
        names = index.names(c, owner.id)
        removed = Removed(
            tenant=tenant,
            prompts=tuple(names),
            versions=len(index.version_rows(c, tenant)),
            states=len(index.state_rows(c, owner.id)),
        )
        index.delete_tenant(c, owner.id)
        index.add_garbage(c, owner.folder, "")
        index.count_removal(c)
    sizes = archive.blobs.files(owner.folder)
    archive.collect(owner.folder)
    scrubbed = archive.database.forget()
    archive.forget_key(owner.folder)
    left = archive.blobs.files(owner.folder)
    if left:
        raise StoreError(
            expected=f"no file of {tenant!r} after its erasure",
            got=f"{len(left)} files in the folder {owner.folder!r}",
            do="erase the tenant again, and look whether another program writes there",
        )
    return replace(removed, files=len(sizes), bytes=sum(sizes.values()), scrubbed=scrubbed)


def put_state(archive: Archive, tenant: str, name: str, data: bytes) -> None:
    """Store the optimizer state of a name, whether or not it has versions; replaces an earlier one."""
    with archive.making(tenant) as (c, owner):
        before = index.files(c, owner.id)
        index.set_state(c, owner.id, name, archive.write(c, owner, "state", data), len(data))
        archive.discard(c, owner, before)
    archive.collect(owner.folder)


def remove_state(archive: Archive, tenant: str, name: str) -> bool:
    """Remove the optimizer state of a name. Returns whether there was one."""
    with archive.locking(tenant) as (c, owner):
        if owner is None or not index.state_rows(c, owner.id, name):
            return False
        before = index.files(c, owner.id)
        index.delete_state(c, owner.id, name)
        archive.discard(c, owner, before)
    archive.collect(owner.folder)
    return True


def rotate_key(archive: Archive, new: Key) -> int:
    """Wrap all tenants' keys with a new store key, in one transaction. Returns how many.

    Raises:
        ConfigError: the store is not encrypted.
    """
    if archive.key is None:
        raise ConfigError(
            expected="an encrypted store",
            got="one without a key",
            do="export it, and import the export into a new store that is made with a key",
        )
    with archive.writing() as c:
        check_key(index.fact(c, "key", lock=True), archive.key)
        owners = index.all_tenants(c)
        for owner in owners:
            own = archive.tenant_key(owner.folder, owner.key)
            index.set_tenant_key(c, owner.id, new.seal(own.secret, f"key/{owner.folder}"))
        index.set_fact(c, "key", new.id)
    archive.key = new
    archive.database.forget()
    return len(owners)
