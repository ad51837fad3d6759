"""A store as a dictionary: what every change must come to. Oracle of the stateful test and of the killed writers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from overture.errors import ConfigError, UnknownPromptError
from overture.store import PromptStore

from .conftest import content, make_prompt

Change = tuple[str, str, str, int]
"""What is done, to which tenant, to which name, and a number: which prompt, version or state."""
KINDS = {
    "publish": 12,
    "state": 3,
    "rollback": 3,
    "pin": 2,
    "unpin": 2,
    "remove": 2,
    "drop": 3,
    "forget": 1,
    "erase": 1,
}
"""How often a random writer does each."""
View = dict[str, Any]


def plan(seed: int) -> Iterator[Change]:
    """Endless changes, the same for one seed."""
    rng = random.Random(seed)
    while True:
        (kind,) = rng.choices(list(KINDS), list(KINDS.values()))
        yield kind, f"tenant-{rng.randrange(2)}", f"name-{rng.randrange(2)}", rng.randrange(5)


def apply(store: PromptStore, change: Change) -> bool:
    """Do a change. Returns False if the store says that it cannot be done now."""
    kind, tenant, name, number = change
    try:
        match kind:
            case "publish":
                store.publish(tenant, name, make_prompt(number))
            case "state":
                store.put_state(tenant, name, bytes([number]) * 3000)
            case "rollback":
                store.rollback(tenant, name, to=number or None)
            case "pin":
                store.pin(tenant, name, number or None)
            case "unpin":
                store.unpin(tenant, name)
            case "remove":
                store.remove(tenant, name)
            case "drop":
                store.remove(tenant, name, number + 1)
            case "forget":
                return store.remove_state(tenant, name)
            case "erase":
                store.erase(tenant)
            case _:
                raise AssertionError(kind)
    except (ConfigError, UnknownPromptError):
        return False
    return True


def view(store: PromptStore) -> View:
    """All that a store holds, every file read and hashed."""
    shown: View = {}
    for record in store.search(all_versions=True):
        entry = shown.setdefault(f"{record.tenant}/{record.name}", {"versions": {}, "current": 0, "pinned": False})
        data = content(store.get(record.tenant, record.name, record.version))
        assert sha256(data).hexdigest() == record.sha256
        entry["versions"][record.version] = record.sha256
        if record.current:
            entry["current"], entry["pinned"] = record.version, record.pinned
    for tenant in ("tenant-0", "tenant-1"):
        for name in ("name-0", "name-1"):
            state = store.state(tenant, name)
            if state is not None:
                shown[f"state of {tenant}/{name}"] = state
    return shown


@dataclass
class _Name:
    versions: dict[int, str] = field(default_factory=dict)
    current: int = 0
    last: int = 0
    pinned: bool = False


@dataclass
class Model:
    """The dictionary."""

    names: dict[tuple[str, str], _Name] = field(default_factory=dict)
    states: dict[tuple[str, str], bytes] = field(default_factory=dict)

    def after(self, change: Change) -> Model:
        """What the store is to hold after one more change."""
        following = deepcopy(self)
        following.apply(change)
        return following

    def apply(self, change: Change) -> bool:
        """Do a change. Returns False, and does nothing, if it cannot be done."""
        kind, tenant, name, number = change
        key = tenant, name
        entry = self.names.get(key)
        if kind == "publish":
            entry = self.names.setdefault(key, _Name())
            entry.last += 1
            entry.versions[entry.last] = sha256(content(make_prompt(number))).hexdigest()
            entry.current = entry.current if entry.pinned else entry.last
            return True
        if kind == "state":
            self.states[key] = bytes([number]) * 3000
            return True
        if kind == "forget":
            return self.states.pop(key, None) is not None
        if kind == "erase":
            self.names = {k: v for k, v in self.names.items() if k[0] != tenant}
            self.states = {k: v for k, v in self.states.items() if k[0] != tenant}
            return True
        return entry is not None and self._change(kind, key, entry, number)

    def _change(self, kind: str, key: tuple[str, str], entry: _Name, number: int) -> bool:
        if kind == "rollback":
            target = number or max((v for v in entry.versions if v < entry.current), default=0)
            if entry.pinned or target not in entry.versions:
                return False
            entry.current = target
        elif kind == "pin":
            if number and number not in entry.versions:
                return False
            entry.current, entry.pinned = number or entry.current, True
        elif kind == "unpin":
            entry.pinned = False
        elif kind == "remove" or (kind == "drop" and list(entry.versions) == [number + 1]):
            del self.names[key]
            self.states.pop(key, None)
        elif kind == "drop":
            if number + 1 not in entry.versions or number + 1 == entry.current:
                return False
            del entry.versions[number + 1]
        return True

    def view(self) -> View:
        """In the form of `view`."""
        shown: View = {
            f"{tenant}/{name}": {"versions": entry.versions, "current": entry.current, "pinned": entry.pinned}
            for (tenant, name), entry in self.names.items()
        }
        return shown | {f"state of {tenant}/{name}": state for (tenant, name), state in self.states.items()}
