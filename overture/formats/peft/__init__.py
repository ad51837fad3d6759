"""PEFT adapters that are soft prompts, read and written without PEFT (`docs/peft.md`)."""

from overture.formats.peft.adapter import TASKS, Adapter, read
from overture.formats.peft.export import save
from overture.formats.peft.load import load

__all__ = ["TASKS", "Adapter", "load", "read", "save"]
