"""What chats and completions have in common as answers: a head, and choices that grow."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pydantic import BaseModel

from overture.serve.protocol.fields import Usage
from overture.serve.requests import Ended, Piece, Token

__all__ = ["Answer", "FinishReason", "Form", "Told", "finish_reason", "in_json"]

FinishReason = Literal["stop", "length"]
"""Why a choice ended."""


def finish_reason(ended: Ended) -> FinishReason:
    """Why an answer ended, in OpenAI's words."""
    return "length" if ended.reason == "length" else "stop"


def in_json(logprob: float | None) -> float:
    """A log-probability. As OpenAI does: what JSON cannot hold is a number that stands for "impossible"."""
    return max(logprob or 0.0, -9999.0)


class Answer(BaseModel):
    """What every object on the wire begins with."""

    id: str
    object: str
    created: int
    model: str


@dataclass(slots=True)
class Told:
    """A choice as far as it is written."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    ended: Ended | None = None

    def add(self, event: Piece | Ended) -> None:
        """Take in what the engine said."""
        if isinstance(event, Ended):
            self.ended = event
        else:
            self.text += event.text
            self.tokens += event.tokens

    @property
    def reason(self) -> FinishReason | None:
        """Why it ended; None as long as it has not."""
        return None if self.ended is None else finish_reason(self.ended)


class Form(ABC):
    """How one answer looks on the wire.

    Args:
        model: the name with its version, as the answer says it.
        likelihoods: whether log-probabilities are wanted.
    """

    kind: ClassVar[str]
    """How ids begin."""

    def __init__(self, model: str, *, likelihoods: bool) -> None:
        self.id, self.created = f"{self.kind}-{secrets.token_hex(12)}", int(time.time())
        self.model, self._likelihoods = model, likelihoods

    @abstractmethod
    def opening(self, index: int) -> BaseModel | None:
        """What a streamed choice begins with, if that is anything."""

    @abstractmethod
    def piece(self, index: int, told: Told, event: Piece | Ended) -> BaseModel:
        """An event of a streamed choice; `told` is the choice before it."""

    @abstractmethod
    def count(self, usage: Usage) -> BaseModel:
        """The last event of a stream, if the client wants tokens counted."""

    @abstractmethod
    def whole(self, choices: Sequence[Told], usage: Usage) -> BaseModel:
        """The answer in one."""

    def _tokens(self, tokens: Sequence[Token]) -> Sequence[Token] | None:
        return tokens if self._likelihoods else None
