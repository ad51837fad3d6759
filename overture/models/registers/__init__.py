"""Text of Overture's own making: chats in many voices and records in many formats, from a seed."""

from overture.models.registers.demo import DEMO_TASK, DEMO_USERS, demo_rows
from overture.models.registers.stream import documents

__all__ = ["DEMO_TASK", "DEMO_USERS", "demo_rows", "documents"]
