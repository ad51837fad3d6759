"""How much the engine takes on at a time."""

from __future__ import annotations

from dataclasses import dataclass

from overture.errors import ConfigError

__all__ = ["EngineConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits of a `Batcher`."""

    max_rows: int = 64
    """Answers written at the same time, 1 or more; others wait."""
    cache_bytes: int = 2 << 30
    """Bytes for the keys and values of all rows. Where they do not suffice rows wait, and the youngest are put back."""
    prefix_bytes: int = 1 << 30
    """Bytes for prompts that are ready to use; the least recently used go first. Those of running rows stay."""
    prefill_chunk: int = 512
    """Tokens of texts that are read in one step, 1 or more. A longer text takes several, while other rows write on."""
    share_from: int = 64
    """Virtual tokens from which rows with one prompt read its prefix in one place, instead of a copy in each slot."""
    loaders: int = 2
    """Threads that load prompts and encode texts, 1 or more."""

    def __post_init__(self) -> None:
        """Refuse what no engine can work with."""
        for name in ("max_rows", "cache_bytes", "prefix_bytes", "prefill_chunk", "share_from", "loaders"):
            least = 0 if name == "prefix_bytes" else 1
            if getattr(self, name) < least:
                raise ConfigError(
                    expected=f"{name} of at least {least}", got=str(getattr(self, name)), do="choose another number"
                )
