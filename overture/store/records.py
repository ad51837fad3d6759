"""What a store says about what it holds: frozen values for people, commands and servers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from overture.prompt import BaseModelId

__all__ = ["Problem", "Record", "Removed", "Stats", "TierStats", "Verification"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One version of one prompt."""

    tenant: str
    """Whose it is."""
    name: str
    """Its name, unique within the tenant."""
    version: int
    """1 for the first; numbers are given once and never again while the name exists."""
    current: bool
    """True if it is what the name stands for now."""
    pinned: bool
    """True if it is current and stays so when others are published."""
    sha256: str
    """SHA-256 of the prompt file, hexadecimal."""
    size: int
    """Bytes of the prompt file, before encryption."""
    kind: str
    """`kv_prefix` or `virtual_tokens`."""
    num_virtual_tokens: int
    """P, at least 1."""
    base: BaseModelId
    """The base model it was tuned on."""
    created: datetime
    """When it was published, in UTC."""
    metadata: Mapping[str, Any]
    """What the publisher noted about it."""
    metrics: Mapping[str, Any]
    """What was measured; from the prompt itself unless the publisher gave others."""

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON-ready fields."""
        return asdict(self) | {"created": self.created.isoformat()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Removed:
    """What a removal took away."""

    tenant: str
    """Whose it was."""
    prompts: tuple[str, ...] = ()
    """Names that exist no longer, sorted."""
    versions: int = 0
    """Versions removed."""
    states: int = 0
    """Optimizer states removed."""
    files: int = 0
    """Files deleted. Equal versions of a tenant share one."""
    bytes: int = 0
    """Their bytes."""
    cached: int = 0
    """Copies dropped from this process's memory and devices."""
    scrubbed: bool = True
    """True if the index's own files hold no trace either. PostgreSQL's do until `VACUUM`; SQLite's as long as another
    process is in the middle of a long read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TierStats:
    """How a tier has done since it was made."""

    hits: int
    """Requests answered from the tier."""
    misses: int
    """Requests that had to load."""
    evictions: int
    """Entries dropped to make room."""
    entries: int
    """Entries held now."""
    pinned: int
    """Of these, entries that stay whatever comes."""
    bytes: int
    """Bytes held now."""
    budget: int
    """Most bytes held."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stats:
    """A store in numbers."""

    schema: int
    """Version of the index's layout."""
    encrypted: bool
    """True if files at rest are encrypted."""
    tenants: int
    """Tenants with at least one prompt or state."""
    prompts: int
    """Names."""
    versions: int
    """Versions of all names."""
    states: int
    """Optimizer states."""
    bytes: int
    """Bytes of prompt files and states, equal ones of a tenant counted once, before encryption."""
    memory: TierStats
    """The host memory tier of this process."""
    devices: Mapping[str, TierStats]
    """The device tiers of this process, by device."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One record that cannot be served."""

    address: str
    """TENANT/NAME@VERSION, or TENANT/NAME for an optimizer state."""
    expected: str
    """What should be there."""
    got: str
    """What is there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """The result of re-checking every file."""

    versions: int
    """Versions checked."""
    states: int
    """Optimizer states checked."""
    bytes: int
    """Bytes read."""
    problems: tuple[Problem, ...]
    """Records that cannot be served; empty if all is well."""
    leftovers: tuple[str, ...]
    """Files that no record needs, left by killed writers."""
    cleaned: bool
    """True if the leftovers were deleted."""
