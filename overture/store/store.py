"""`PromptStore`: prompts of many users, by tenant, name and version, from the disk through memory to a device."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from overture.errors import ConfigError
from overture.formats import native
from overture.prompt import BaseModelId, SoftPrompt
from overture.store import changes, index, transfer
from overture.store.archive import Location, NewVersion
from overture.store.copies import Copies
from overture.store.names import check_name, check_tenant
from overture.store.opening import open_archive
from overture.store.records import Record, Removed, Stats, Verification
from overture.store.sealing import Key
from overture.store.search import matching
from overture.store.tables import SCHEMA
from overture.store.verify import verify

__all__ = ["PromptStore"]

_MOST_NAMES = 100_000
"""Names to remember at a time, so that a store of millions does not fill the memory with them."""


@dataclass(slots=True)
class _View:
    """What names stood for at one moment of the index."""

    moment: int | None = None
    removals: str = ""
    found: dict[tuple[str, str, int | None], Location] = field(default_factory=dict)


class PromptStore:
    """Prompts on the disk, and copies of those in use. Safe in threads; any number of processes may open one store.

    Args:
        location: the store's folder, or the URL of a PostgreSQL database that holds the index.
        blobs: where the files lie: a folder or any URL that fsspec opens, such as `s3://bucket/prompts`. By default in
            the store's folder.
        key: encrypts files at rest. A store is made with or without a key and stays so.
        memory: most bytes of prompts to keep in host memory.
        read_only: refuse every change; the store must exist.
        create: make the store if it is not there.
        max_age: seconds for which a PostgreSQL index is trusted not to have changed. An index file is always asked.

    Raises:
        StoreError: missing, of a newer version, encrypted with another key, or not to be read.
        ConfigError: no such kind of store, or an option that does not fit it.
    """

    def __init__(
        self,
        location: str | os.PathLike[str],
        *,
        blobs: str | os.PathLike[str] | None = None,
        key: Key | None = None,
        memory: int = 1 << 30,
        read_only: bool = False,
        create: bool = True,
        max_age: float = 1.0,
    ) -> None:
        self._archive = open_archive(
            os.fspath(location), None if blobs is None else os.fspath(blobs), key, read_only=read_only, create=create
        )
        self._max_age = max_age
        self._lock = threading.Lock()
        self._view = _View()
        self.memory = Copies(self._locate, self._load, memory)
        """The host memory tier."""
        self._devices: dict[str, Copies] = {}

    @classmethod
    def open(cls, location: str | os.PathLike[str], **options: Any) -> PromptStore:
        """The same as `PromptStore(location, ...)`, for those who look for it here."""
        return cls(location, **options)

    def close(self) -> None:
        """Close the database. Prompts already handed out stay usable."""
        self._archive.database.close()

    def __enter__(self) -> PromptStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Putting in

    def publish(
        self,
        tenant: str,
        name: str,
        prompt: SoftPrompt,
        *,
        metadata: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> Record:
        """Store the next version of a prompt, and let its name stand for it unless another version is pinned.

        Args:
            tenant: whose prompt; the tenant is made if it is new.
            name: its name within the tenant.
            prompt: the prompt.
            metadata: notes to find it by, in JSON's types.
            metrics: what was measured; by default `prompt.metrics`.

        Returns:
            The version. It is on the disk.

        Raises:
            ConfigError: a name that is not allowed, or metadata that JSON cannot hold.
            PromptFileError: the prompt cannot be stored (NaN, a dtype or shape that the format lacks).
        """
        data = native.dumps(prompt)
        new = transfer.described(data, prompt, metadata or {}, metrics, datetime.now(UTC))
        return self._published(tenant, name, new)

    def publish_file(
        self,
        tenant: str,
        name: str,
        path: str | os.PathLike[str],
        *,
        metadata: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> Record:
        """As `publish`, from a prompt file, byte for byte.

        Raises:
            PromptFileError: missing, damaged, of another format or version, or with NaN inside.
        """
        data, prompt = transfer.read_file(Path(path))
        new = transfer.described(data, prompt, metadata or {}, metrics, datetime.now(UTC))
        return self._published(tenant, name, new)

    def put_state(self, tenant: str, name: str, data: bytes) -> None:
        """Keep the optimizer state of a name, such as a checkpoint's bytes; it replaces the last one."""
        changes.put_state(self._archive, check_tenant(tenant), check_name(name), data)

    # Getting out

    def get(self, tenant: str, name: str, version: int | None = None, *, base: BaseModelId | None = None) -> SoftPrompt:
        """A prompt, by default in the version that its name stands for; from memory if it is there.

        Raises:
            UnknownPromptError: the tenant has no such prompt or version.
            PromptFileError: its file is missing or damaged.
            BaseMismatchError: it was tuned on another model than `base`.
        """
        return self.memory.get(tenant, name, version, base=base)

    def device(self, device: str | torch.device, *, budget: int) -> Copies:
        """A tier on a device, above the one in memory; one for each device.

        Args:
            device: such as `cuda:0`.
            budget: most bytes of prompts to keep there.
        """
        place = torch.device(device)
        if str(place) in self._devices:
            raise ConfigError(expected="one tier for each device", got=f"another for {place}", do="use the first one")

        def copy(location: Location) -> SoftPrompt:
            prompt = self.memory.load(location)
            head = prompt.head and prompt.head.map(lambda tensor: tensor.to(place))
            return replace(prompt, value=prompt.value.map(lambda tensor: tensor.to(place)), head=head)

        tier = self._devices[str(place)] = Copies(self._locate, copy, budget)
        return tier

    def state(self, tenant: str, name: str) -> bytes | None:
        """The optimizer state of a name; None if there is none."""
        return self._archive.state(check_tenant(tenant), check_name(name))

    def record(self, tenant: str, name: str, version: int | None = None) -> Record:
        """What the index says of a version, by default the current one.

        Raises:
            UnknownPromptError: the tenant has no such prompt or version.
        """
        return self._archive.record(check_tenant(tenant), check_name(name), version)

    def tenants(self) -> list[str]:
        """Tenants that have a prompt or a state, sorted."""
        with self._archive.database.reading() as c:
            return index.tenant_names(c)

    def list_prompts(self, tenant: str) -> list[Record]:
        """A tenant's prompts in their current versions, by name; none if there is no such tenant."""
        return self._archive.records(check_tenant(tenant), all_versions=False)

    def versions(self, tenant: str, name: str) -> list[Record]:
        """All versions of a prompt, oldest first.

        Raises:
            UnknownPromptError: the tenant has no such prompt.
        """
        found = self._archive.records(check_tenant(tenant), check_name(name), all_versions=True)
        return found or [self.record(tenant, name)]

    def search(
        self,
        *,
        tenant: str | None = None,
        name: str | None = None,
        base: str | None = None,
        where: Sequence[str] = (),
        all_versions: bool = False,
    ) -> list[Record]:
        """Records that fit all that is given, by tenant, name and version.

        Args:
            tenant: of this tenant only.
            name: a name, with `*` and `?` for any characters.
            base: the base model: its name, or the beginning of its digest.
            where: conditions on metadata and metrics, such as `loss<2.5`, `team=red`, `team!=red`.
            all_versions: also versions that are not current.

        Raises:
            ConfigError: a condition that cannot be read.
        """
        records = self._archive.records(tenant and check_tenant(tenant), all_versions=all_versions)
        return matching(records, name=name, base=base, where=where)

    # Changing what a name stands for

    def rollback(self, tenant: str, name: str, *, to: int | None = None) -> Record:
        """Let a name stand for an earlier version: `to`, or the one before the current. No version is lost.

        Raises:
            UnknownPromptError: the tenant has no such prompt or version.
            ConfigError: the name is pinned, or has no earlier version.
        """
        changes.roll_back(self._archive, check_tenant(tenant), check_name(name), to)
        return self.record(tenant, name)

    def pin(self, tenant: str, name: str, version: int | None = None) -> Record:
        """Let a name stand for a version (the current one if None) and stay there when others are published."""
        changes.pin(self._archive, check_tenant(tenant), check_name(name), version)
        return self.record(tenant, name)

    def unpin(self, tenant: str, name: str) -> Record:
        """Let a name follow what is published from now on; until then it stands for what it did."""
        changes.unpin(self._archive, check_tenant(tenant), check_name(name))
        return self.record(tenant, name)

    # Removing

    def remove(self, tenant: str, name: str, version: int | None = None) -> Removed:
        """Remove a prompt with all its versions and its optimizer state, or one version that is not current.

        Raises:
            UnknownPromptError: the tenant has no such prompt or version.
            ConfigError: the version is current and there are others.
        """
        removed = changes.remove(self._archive, check_tenant(tenant), check_name(name), version)
        return replace(removed, cached=self.refresh())

    def remove_state(self, tenant: str, name: str) -> bool:
        """Remove the optimizer state of a name. Returns whether there was one."""
        return changes.remove_state(self._archive, check_tenant(tenant), check_name(name))

    def erase(self, tenant: str) -> Removed:
        """Remove all that is stored of a tenant: names, versions, files, optimizer states, copies in memory.

        Returns:
            What was removed; nothing if nothing was stored. Other processes drop their copies when they next look at
            the index (at the next `get`, or `refresh`).
        """
        removed = changes.erase(self._archive, check_tenant(tenant))
        return replace(removed, cached=self.refresh())

    def refresh(self) -> int:
        """Drop copies of what was removed. Returns how many. `get` does so when another process removed something."""
        with self._archive.database.reading() as c:
            live = index.live(c, {folder for tier in self._tiers() for folder, _ in tier.held()})
        # Memory first: a device copy that is being made meanwhile finds nothing to copy from.
        return sum(tier.drop(lambda key: key not in live) for tier in self._tiers())

    # Looking after

    def export(self, folder: str | os.PathLike[str], *, tenant: str | None = None) -> int:
        """Write all prompts, or a tenant's, with all versions to a new folder, not encrypted. `import_folder` reads it.

        Returns:
            How many versions were written.

        Raises:
            ConfigError: the folder is there and not empty.
        """
        return transfer.export(self._archive, Path(folder), tenant and check_tenant(tenant))

    def import_folder(self, folder: str | os.PathLike[str], *, tenant: str | None = None) -> int:
        """Take in an export, or a folder of prompt files, each under its file's name.

        Args:
            folder: what `export` wrote, or a folder with `.safetensors` files.
            tenant: whose the prompts are to be; needed for files, and for an export of one tenant if it is to be
                another.

        Returns:
            How many versions were new. Importing again imports nothing twice.

        Raises:
            PromptFileError: a file is missing or damaged; names before it are imported.
            ConfigError: no tenant for files, or another prompt under one of the numbers.
        """
        return transfer.import_folder(self._archive, Path(folder), tenant and check_tenant(tenant))

    def push(self, tenant: str, name: str, folder: str | os.PathLike[str], *, version: int | None = None) -> Record:
        """Write a version in the layout of a Hub repository: `prompt.safetensors` and a model card, `README.md`."""
        return transfer.push(self._archive, check_tenant(tenant), check_name(name), version, Path(folder))

    def pull(self, folder: str | os.PathLike[str], tenant: str, name: str) -> Record:
        """Publish the prompt of a folder in the layout of a Hub repository.

        Raises:
            PromptFileError: there is no `prompt.safetensors`, or it is damaged.
        """
        return self.publish_file(tenant, name, Path(folder) / transfer.HUB_FILE)

    def verify(self, *, clean: bool = False) -> Verification:
        """Read every file again and compare it with the index.

        Args:
            clean: also delete files that no record needs, such as killed writers leave.
        """
        return verify(self._archive, clean=clean)

    def stats(self) -> Stats:
        """The store in numbers."""
        with self._archive.database.reading() as c:
            tenants, prompts, versions, states, size = index.totals(c)
        return Stats(
            schema=SCHEMA,
            encrypted=self._archive.encrypted,
            tenants=tenants,
            prompts=prompts,
            versions=versions,
            states=states,
            bytes=size,
            memory=self.memory.stats,
            devices={place: tier.stats for place, tier in self._devices.items()},
        )

    def rotate_key(self, new: Key) -> int:
        """Replace the store's key; files stay as they are. Other processes go on until they need a new tenant's key.

        Returns:
            How many tenants' keys were wrapped anew.

        Raises:
            ConfigError: the store is not encrypted.
        """
        return changes.rotate_key(self._archive, new)

    def _published(self, tenant: str, name: str, new: NewVersion) -> Record:
        tenant, name = check_tenant(tenant), check_name(name)
        return self._archive.record(tenant, name, changes.publish(self._archive, tenant, name, new))

    def _tiers(self) -> tuple[Copies, ...]:
        return self.memory, *self._devices.values()

    def _load(self, location: Location) -> SoftPrompt:
        return native.loads(self._archive.read(location), location.address)

    def _locate(self, tenant: str, name: str, version: int | None) -> Location:
        """What a name stands for now. Asks the index only if it has changed since the last time."""
        moment = self._archive.database.moment(self._max_age)
        view = self._view
        if view.moment != moment:
            view = self._look_again(moment)
        wanted = tenant, name, version
        found = view.found.get(wanted)
        if found is None:
            found = self._archive.locate(check_tenant(tenant), check_name(name), version)
            if len(view.found) >= _MOST_NAMES:
                view.found.clear()
            view.found[wanted] = found  # not older than `moment`, so it may stand in this view
        return found

    def _look_again(self, moment: int) -> _View:
        with self._archive.database.reading() as c:
            removals = index.fact(c, "removals")
        with self._lock:
            view, self._view = self._view, _View(moment, removals)
        if view.moment is not None and view.removals != removals:
            self.refresh()
        return self._view
