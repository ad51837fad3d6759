"""Options of self-study."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from overture.errors import ConfigError
from overture.tuning.memory import parse_bytes

__all__ = ["StudyConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyConfig:
    """What a model learns a text from. Counts are for the whole text, shared out evenly among its chunks."""

    quotes: int = 128
    """Rows that read a few tokens of the text, and answer with those that follow there; 0 or more."""
    continuations: int = 64
    """Rows that read a few tokens of the text, and answer with what the base says behind them; 0 or more."""
    questions: int = 64
    """Questions that the base asks and answers, 0 or more. The user's own questions take their place."""
    turn_tokens: int = 48
    """Most tokens of a question, and of an answer, 4 or more."""
    chunk_tokens: int | None = None
    """Most tokens of a chunk, 1 or more; None for as many as leave room for a question and its answer."""
    teacher_memory: int | str = "512MB"
    """What the teacher's answers may take, in bytes or as `"512MB"`. Of each distribution the likeliest tokens are
    kept, as many as that allows, and the mass of all others as one number."""

    def __post_init__(self) -> None:
        for name, least in (("quotes", 0), ("continuations", 0), ("questions", 0), ("turn_tokens", 4)):
            _check(name, getattr(self, name), least)
        if self.chunk_tokens is not None:
            _check("chunk_tokens", self.chunk_tokens, 1)
        parse_bytes(self.teacher_memory)

    def as_dict(self) -> dict[str, Any]:
        """All options, JSON-ready."""
        return asdict(self)


def _check(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(expected=f"{name} of {least} or more", got=repr(value), do=f"choose another {name}")
