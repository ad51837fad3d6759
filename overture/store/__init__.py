"""Prompts of many users at rest: an index beside files, and copies in memory and on devices."""

from overture.store.names import Address
from overture.store.records import Problem, Record, Removed, Stats, TierStats, Verification
from overture.store.sealing import Key
from overture.store.store import PromptStore

__all__ = ["Address", "Key", "Problem", "PromptStore", "Record", "Removed", "Stats", "TierStats", "Verification"]
