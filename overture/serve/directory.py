"""Which prompt a caller means by a model's name. What a caller may not use is never looked up, so it cannot be told
from what does not exist, by the answer or by its time.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from overture.errors import ConfigError, UnknownPromptError
from overture.prompt import BaseModelId
from overture.serve.keys import Caller
from overture.serve.refusal import Refusal, unknown_model
from overture.serve.requests import Address
from overture.store import PromptStore, Record
from overture.store.names import Address as Written
from overture.store.names import check_name, check_tenant

__all__ = ["Choice", "Directory", "Served"]

_MOST_PARTS = 4
"""Prompts that one name may join."""


@dataclass(frozen=True, slots=True)
class Served:
    """A prompt as a caller sees it."""

    id: str
    """The name by which the caller asks for it."""
    record: Record


@dataclass(frozen=True, slots=True)
class Choice:
    """What a model's name stands for."""

    id: str
    """The name with the versions that answer, such as `task@2+bard@1`."""
    records: tuple[Record, ...]
    """None for the base model; several are joined in this order."""

    @property
    def addresses(self) -> tuple[Address, ...]:
        """The versions, as the engine wants them."""
        return tuple(Address(r.tenant, r.name, r.version) for r in self.records)


class Directory:
    """The prompts of a store by the names that callers use. It asks the index, so call it from a thread that may wait.

    Args:
        store: the prompts.
        base: the base model that is served; prompts of others are not listed.
        model_name: what the base model is called.
        shared: tenants whose prompts everybody may use.
    """

    def __init__(self, store: PromptStore, base: BaseModelId, model_name: str, shared: tuple[str, ...] = ()) -> None:
        self._store, self._base, self._model_name = store, base, model_name
        self._shared = tuple(map(check_tenant, shared))

    def listed(self, caller: Caller) -> list[Served]:
        """All that the caller may name: the caller's own prompts, then shared ones; by tenant and name."""
        records = self._records(caller)
        names = Counter(r.name for r in records)
        first = {r.name: r.tenant for r in reversed(records)}

        def plain(record: Record) -> bool:
            """Whether the bare name means this prompt."""
            if record.name == self._model_name:
                return False
            return names[record.name] == 1 if caller.tenant is None else first[record.name] == record.tenant

        return [Served(r.name if plain(r) else f"{r.tenant}/{r.name}", r) for r in filter(self._fits, records)]

    def resolve(self, caller: Caller, model: str) -> Choice:
        """What a name stands for: the base model, NAME, NAME@VERSION, TENANT/NAME, or several of them joined by `+`.

        Raises:
            Refusal: the caller has no such prompt, or it belongs to another base model.
        """
        if model == self._model_name:
            return Choice(model, ())
        parts, records = [model], [self._find(caller, model)]
        if records == [None] and "+" in model:  # only now, since a name may hold a plus of its own
            parts = model.split("+")
            if len(parts) > _MOST_PARTS:
                raise Refusal(400, f"At most {_MOST_PARTS} prompts may be joined.", param="model")
            records = [self._find(caller, part) for part in parts]
        found = tuple(record for record in records if record is not None)
        if len(found) < len(parts):
            raise unknown_model(model)
        if not all(map(self._fits, found)):
            message = f"The model {model[:200]!r} was tuned on another base model than {self._model_name!r}."
            raise Refusal(404, message, code="model_not_found", param="model")
        names = (part.partition("/") for part in parts)
        bare = [(f"{tenant}/" if slash else "") + r.name for (tenant, slash, _), r in zip(names, found, strict=True)]
        return Choice("+".join(f"{name}@{r.version}" for name, r in zip(bare, found, strict=True)), found)

    def _find(self, caller: Caller, text: str) -> Record | None:
        """A prompt by NAME or TENANT/NAME, each with or without @VERSION."""
        try:
            if "/" in text:
                written = Written.parse(text)
                assert written.name is not None
                allowed = caller.tenant is None or written.tenant in self._tenants(caller.tenant)
                return self._record(written.tenant, written.name, written.version) if allowed else None
            bare, at, number = text.partition("@")
            if at and not re.fullmatch("[1-9][0-9]{0,8}", number):
                return None
            name, version = check_name(bare), int(number) if at else None
        except ConfigError:
            return None
        if caller.tenant is None:
            return self._only(name, version)
        owned = (self._record(tenant, name, None) for tenant in self._tenants(caller.tenant))
        owner = next((record for record in owned if record is not None), None)
        return owner if owner is None or version is None else self._record(owner.tenant, name, version)

    def _only(self, name: str, version: int | None) -> Record | None:
        """Where all tenants are open, a bare name must be one tenant's alone."""
        owners = [record.tenant for record in self._store.search() if record.name == name]
        return self._record(owners[0], name, version) if len(owners) == 1 else None

    def _record(self, tenant: str, name: str, version: int | None) -> Record | None:
        try:
            return self._store.record(tenant, name, version)
        except UnknownPromptError:
            return None

    def _records(self, caller: Caller) -> list[Record]:
        if caller.tenant is None:
            return self._store.search()
        return [record for tenant in self._tenants(caller.tenant) for record in self._store.list_prompts(tenant)]

    def _tenants(self, own: str) -> list[str]:
        """Whose prompts a tenant may use, in the order in which bare names are looked up."""
        return [own, *(tenant for tenant in self._shared if tenant != own)]

    def _fits(self, record: Record) -> bool:
        return (record.base.architecture, record.base.digest) == (self._base.architecture, self._base.digest)
