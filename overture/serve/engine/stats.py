"""What an engine tells about itself."""

from __future__ import annotations

from dataclasses import dataclass

from overture.store.records import TierStats

__all__ = ["EngineStats"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """The state of an engine, and counters since its start."""

    running: int
    """Rows in slots."""
    waiting: int
    """Rows that wait for a slot."""
    loading: int
    """Jobs whose prompts are being loaded."""
    prompt_tokens: int
    """Tokens of texts that were read; more than once where rows were put back."""
    completion_tokens: int
    """Tokens that were written."""
    steps: int
    step_seconds: float
    """Time in all steps together."""
    last_step_seconds: float
    ended: dict[str, int]
    """Jobs by the reason for which they ended."""
    preemptions: int
    """Rows that were put back to make room."""
    cache_bytes: int
    """Of all slots, taken or free."""
    cache_budget: int
    prefixes: TierStats
    """Prompts that are ready to use."""
