"""Every question to the index and every change of it, each a function of an open transaction."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from overture.store.tables import facts, garbage, prompts, states, tenants, versions

__all__ = [
    "File",
    "Prompt",
    "Stored",
    "Tenant",
    "Version",
    "add_garbage",
    "add_prompt",
    "add_tenant",
    "add_version",
    "all_tenants",
    "change_prompt",
    "count_removal",
    "delete_prompt",
    "delete_state",
    "delete_tenant",
    "delete_version",
    "fact",
    "files",
    "find_tenant",
    "garbage_of",
    "names",
    "prompt",
    "remove_garbage",
    "set_fact",
    "set_state",
    "set_tenant_key",
    "state_rows",
    "tenant",
    "totals",
    "version",
    "version_rows",
]

File = tuple[str, str]
"""What a record needs on the disk: `prompt` or `state`, and the SHA-256 of the content."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant's row."""

    id: int
    name: str
    folder: str
    """Where its files lie."""
    key: bytes | None
    """Its own key, sealed with the store's."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A name's row."""

    id: int
    name: str
    current: int
    """The version that the name stands for."""
    last: int
    """The highest number ever given."""
    pinned: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """A version's row, without its number; the fields are those of `Record`."""

    sha256: str
    size: int
    kind: str
    num_virtual_tokens: int
    architecture: str
    digest: str
    base_name: str
    created: int
    """Microseconds since 1970, UTC."""
    details: bytes
    """Metadata and metrics."""


class Stored(NamedTuple):
    """A version with all that the index knows of it, in the order of the query's columns."""

    tenant: str
    folder: str
    key: bytes | None
    name: str
    current: int
    pinned: bool
    version: int
    sha256: str
    size: int
    kind: str
    num_virtual_tokens: int
    architecture: str
    digest: str
    base_name: str
    created: int
    details: bytes


_TENANT = tenants.c["id", "name", "folder", "key"]
_PROMPT = prompts.c["id", "name", "current", "last", "pinned"]


def fact(c: Connection, name: str, *, lock: bool = False) -> str:
    """What the index says of itself; with `lock`, it stays so until the transaction ends."""
    query = sa.select(facts.c.value).where(facts.c.name == name)
    return str(c.execute(query.with_for_update() if lock else query).scalar_one())


def set_fact(c: Connection, name: str, value: str) -> None:
    """Change what the index says of itself."""
    c.execute(sa.update(facts).where(facts.c.name == name).values(value=value))


def count_removal(c: Connection) -> None:
    """Let everybody who keeps copies know that some may have to go."""
    set_fact(c, "removals", str(int(fact(c, "removals", lock=True)) + 1))


# Tenants


def tenant(c: Connection, name: str, *, lock: bool = False) -> Tenant | None:
    """A tenant; with `lock`, nobody else changes anything of it until the transaction ends."""
    query = sa.select(*_TENANT).where(tenants.c.name == name)
    row = c.execute(query.with_for_update() if lock else query).one_or_none()
    return Tenant(*row) if row else None


def find_tenant(c: Connection, folder: str) -> Tenant | None:
    """The tenant whose files lie in `folder`, locked."""
    row = c.execute(sa.select(*_TENANT).where(tenants.c.folder == folder).with_for_update()).one_or_none()
    return Tenant(*row) if row else None


def all_tenants(c: Connection) -> list[Tenant]:
    """All tenants by name, also those that have nothing yet."""
    return [Tenant(*row) for row in c.execute(sa.select(*_TENANT).order_by(tenants.c.name))]


def tenant_names(c: Connection) -> list[str]:
    """Tenants that have a prompt or a state, sorted."""
    has = sa.union(sa.select(prompts.c.tenant), sa.select(states.c.tenant)).subquery()
    return list(
        c.execute(sa.select(tenants.c.name).join(has, has.c.tenant == tenants.c.id).order_by(tenants.c.name)).scalars()
    )


def add_tenant(c: Connection, name: str, folder: str, key: bytes | None) -> None:
    """Make a tenant unless another process just did."""
    _insert_if_new(c, tenants, name=name, folder=folder, key=key)


def set_tenant_key(c: Connection, id_: int, key: bytes) -> None:
    """Replace a tenant's sealed key."""
    c.execute(sa.update(tenants).where(tenants.c.id == id_).values(key=key))


def delete_tenant(c: Connection, id_: int) -> None:
    """Delete a tenant's row and all that hangs on it."""
    c.execute(sa.delete(tenants).where(tenants.c.id == id_))


# Prompts and versions


def prompt(c: Connection, tenant_id: int, name: str) -> Prompt | None:
    """A tenant's prompt by name."""
    query = sa.select(*_PROMPT).where(prompts.c.tenant == tenant_id, prompts.c.name == name)
    row = c.execute(query).one_or_none()
    return Prompt(*row) if row else None


def names(c: Connection, tenant_id: int) -> list[str]:
    """A tenant's names, sorted."""
    query = sa.select(prompts.c.name).where(prompts.c.tenant == tenant_id).order_by(prompts.c.name)
    return list(c.execute(query).scalars())


def add_prompt(c: Connection, tenant_id: int, name: str) -> Prompt:
    """Make a name that has no versions yet."""
    values = {"tenant": tenant_id, "name": name, "current": 0, "last": 0, "pinned": False}
    id_ = c.execute(sa.insert(prompts).values(**values)).inserted_primary_key
    assert id_ is not None
    return Prompt(id_[0], name, 0, 0, False)


def change_prompt(c: Connection, id_: int, **values: int | bool) -> None:
    """Change fields of a name's row."""
    c.execute(sa.update(prompts).where(prompts.c.id == id_).values(**values))


def delete_prompt(c: Connection, tenant_id: int, found: Prompt) -> None:
    """Delete a name with its versions and its state."""
    c.execute(sa.delete(prompts).where(prompts.c.id == found.id))
    c.execute(sa.delete(states).where(states.c.tenant == tenant_id, states.c.name == found.name))


def add_version(c: Connection, prompt_id: int, number: int, row: Version) -> None:
    """Add a version to a name."""
    c.execute(sa.insert(versions).values(prompt=prompt_id, version=number, **asdict(row)))


def delete_version(c: Connection, prompt_id: int, number: int) -> None:
    """Delete one version."""
    c.execute(sa.delete(versions).where(versions.c.prompt == prompt_id, versions.c.version == number))


# In the order of `Stored`.
_RECORD = (
    tenants.c.name.label("tenant"),
    tenants.c.folder,
    tenants.c.key,
    prompts.c.name,
    prompts.c.current,
    prompts.c.pinned,
    *(column for column in versions.c if column.name != "prompt"),
)
_JOINED = tenants.join(prompts).join(versions)


_CURRENT = (
    sa.select(*_RECORD)
    .select_from(_JOINED)
    .where(tenants.c.name == sa.bindparam("of"), prompts.c.name == sa.bindparam("called"))
    .where(versions.c.version == sa.func.coalesce(sa.bindparam("number", type_=sa.Integer), prompts.c.current))
)
"""Asked at every cold load, so not put together each time."""


def version(c: Connection, tenant: str, name: str, number: int | None) -> Stored | None:
    """One version of a name, the current one if `number` is None."""
    row = c.execute(_CURRENT, {"of": tenant, "called": name, "number": number}).one_or_none()
    return None if row is None else Stored._make(row)


def version_rows(
    c: Connection, tenant: str | None = None, name: str | None = None, *, all_versions: bool = True
) -> list[Stored]:
    """Versions of all names, of a tenant's, or of one name, by tenant, name and number; or only the current ones."""
    query = sa.select(*_RECORD).select_from(_JOINED).order_by(tenants.c.name, prompts.c.name, versions.c.version)
    if tenant is not None:
        query = query.where(tenants.c.name == tenant)
    if name is not None:
        query = query.where(prompts.c.name == name)
    if not all_versions:
        query = query.where(versions.c.version == prompts.c.current)
    return [Stored._make(row) for row in c.execute(query).all()]


# Optimizer states


def set_state(c: Connection, tenant_id: int, name: str, sha256: str, size: int) -> None:
    """Put or replace the state of a name."""
    c.execute(sa.delete(states).where(states.c.tenant == tenant_id, states.c.name == name))
    c.execute(sa.insert(states).values(tenant=tenant_id, name=name, sha256=sha256, size=size))


def delete_state(c: Connection, tenant_id: int, name: str) -> None:
    """Delete the state of a name."""
    c.execute(sa.delete(states).where(states.c.tenant == tenant_id, states.c.name == name))


def state_rows(c: Connection, tenant_id: int, name: str | None = None) -> list[tuple[str, str, int]]:
    """Name, SHA-256 and size of a tenant's states, or of that of one name."""
    query = sa.select(*states.c["name", "sha256", "size"]).where(states.c.tenant == tenant_id).order_by(states.c.name)
    query = query if name is None else query.where(states.c.name == name)
    return [(row.name, row.sha256, row.size) for row in c.execute(query)]


# Files


def files(c: Connection, tenant_id: int) -> dict[File, int]:
    """Every file that a tenant's records need, with the bytes of its content."""
    of_prompts = sa.select(*versions.c["sha256", "size"]).join(prompts).where(prompts.c.tenant == tenant_id)
    of_states = sa.select(*states.c["sha256", "size"]).where(states.c.tenant == tenant_id)
    found: dict[File, int] = {("prompt", sha256): size for sha256, size in c.execute(of_prompts)}
    return found | {("state", sha256): size for sha256, size in c.execute(of_states)}


def live(c: Connection, folders: Collection[str]) -> set[tuple[str, str]]:
    """Folder and SHA-256 of every prompt file in `folders` that a record needs."""
    found: set[tuple[str, str]] = set()
    chosen = sorted(folders)
    for start in range(0, len(chosen), 500):  # databases limit how long a list may be
        some = tenants.c.folder.in_(chosen[start : start + 500])
        query = sa.select(tenants.c.folder, versions.c.sha256).select_from(_JOINED).where(some)
        found |= {(folder, sha256) for folder, sha256 in c.execute(query)}
    return found


def add_garbage(c: Connection, folder: str, file: str) -> None:
    """Note a file, or with an empty name a folder, for deletion once the transaction is durable."""
    _insert_if_new(c, garbage, folder=folder, file=file)


def garbage_of(c: Connection, folder: str | None = None) -> list[tuple[str, str]]:
    """Folder and file of all that is still to be deleted."""
    query = sa.select(*garbage.c["folder", "file"]).order_by(garbage.c.folder, garbage.c.file)
    query = query if folder is None else query.where(garbage.c.folder == folder)
    return [(row.folder, row.file) for row in c.execute(query)]


def remove_garbage(c: Connection, folder: str, file: str) -> None:
    """It was deleted, or is needed again."""
    c.execute(sa.delete(garbage).where(garbage.c.folder == folder, garbage.c.file == file))


def totals(c: Connection) -> tuple[int, int, int, int, int]:
    """Tenants that have anything, names, versions, states, and bytes with equal content of a tenant counted once."""
    has = sa.union(sa.select(prompts.c.tenant), sa.select(states.c.tenant)).subquery()
    of_prompts = sa.select(prompts.c.tenant, *versions.c["sha256", "size"]).join(versions).distinct().subquery()
    of_states = sa.select(*states.c["tenant", "sha256", "size"]).distinct().subquery()
    counts = [
        c.execute(sa.select(sa.func.count()).select_from(t)).scalar_one() for t in (has, prompts, versions, states)
    ]
    sizes = [c.execute(sa.select(sa.func.sum(t.c.size))).scalar_one() or 0 for t in (of_prompts, of_states)]
    return counts[0], counts[1], counts[2], counts[3], int(sum(sizes))


def _insert_if_new(c: Connection, table: sa.Table, **values: Any) -> None:
    insert = postgresql.insert if c.dialect.name == "postgresql" else sqlite.insert
    c.execute(insert(table).values(**values).on_conflict_do_nothing())
