"""What the connector is told in `kv_connector_extra_config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from overture.errors import ConfigError
from overture.store import Key, PromptStore

__all__ = ["Options", "open_store"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Where prompts are, how many a worker holds, and who may ask for them."""

    store: str
    """The store's folder, or the URL of its database."""
    blobs: str | None = None
    """Where its files lie, if not in its folder."""
    memory: int = 4 << 30
    """Most bytes of prompts in host memory, counted over all workers of one engine."""
    threads: int = 4
    """Prompts that a worker reads at once."""
    keys: str | None = None
    """Database of the keys that the front door asks for; by default in the store's folder."""
    open: bool = False
    """Whether the front door asks for no keys: everybody may use every tenant's prompts."""
    shared: tuple[str, ...] = ()
    """Tenants whose prompts everybody may use."""
    base: str | None = None
    """Digest of the base model, as `overture inspect` shows it. None has it taken from the model, which is loaded into
    host memory for that."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Options:
        """The options in a configuration.

        Raises:
            ConfigError: no store, or an option that there is not.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(config) - known)
        if unknown or not config.get("store"):
            raise ConfigError(
                expected=f"kv_connector_extra_config with a store and of {', '.join(sorted(known))}",
                got=", ".join(unknown) or "no store",
                do='write {"store": "FOLDER"}',
            )
        found: dict[str, Any] = dict(config)
        return cls(**found | {"shared": tuple(found.get("shared", ()))})

    def as_config(self) -> dict[str, Any]:
        """As `kv_connector_extra_config`."""
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {name: value for name, value in plain.items() if value is not None}


def open_store(options: Options) -> PromptStore:
    """The store for reading, without copies of its own. Its key comes from the environment, as the command's does."""
    return PromptStore(
        options.store,
        blobs=options.blobs,
        key=Key.from_environment(),
        memory=0,
        read_only=True,
        create=False,
    )
