"""An answer that is being written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from overture.errors import OvertureError
from overture.prompt import SoftPrompt
from overture.serve.engine.cache import Line
from overture.serve.engine.front import Front
from overture.serve.engine.sample import Choice, Chooser
from overture.serve.engine.text import Decoder, Writer
from overture.serve.requests import Alternative, Ended, Event, Job, Token

__all__ = ["Deliver", "Reason", "Row"]

Deliver = Callable[[Event], None]
Reason = Literal["stop", "length", "cancelled", "error"]


@dataclass(eq=False, slots=True, kw_only=True)
class Row(Line):
    """One job on its way through the engine: its line grows by the tokens of the answer."""

    job: Job
    deliver: Deliver
    prompts: tuple[SoftPrompt, ...] = ()
    """The loaded prompts, kept for as long as the row is there."""
    given: int = 0
    """Tokens of the line that are not the answer's."""
    text_tokens: int = 0
    """Of these, real ones."""
    most: int = 0
    """Tokens of the answer at most."""
    front: Front | None = None
    """While it waits: what is to stand in front of it, once somebody has looked."""
    chooser: Chooser
    writer: Writer
    decoder: Decoder
    ended: bool = False

    @property
    def written(self) -> int:
        """Tokens of the answer."""
        return len(self.ids) - self.given

    def accept(self, choice: Choice, last: frozenset[int]) -> None:
        """Take the next token, hand out what it makes sure, and end if it is the last."""
        if choice.id in last:
            return self.end("stop")
        self.ids.append(choice.id)
        self.chooser.chosen(choice.id)
        piece = self.writer.push(self._token(choice))
        if piece is not None:
            self.deliver(piece)
        if self.writer.stopped:
            self.end("stop")
        elif self.written >= self.most:
            self.end("length")

    def end(self, reason: Reason, error: OvertureError | None = None) -> None:
        """Hand out what is left and the end, once."""
        if self.ended:
            return
        self.ended = True
        piece = self.writer.finish() if reason in ("stop", "length") else None
        if piece is not None:
            self.deliver(piece)
        self.deliver(Ended(reason, self.text_tokens, self.written, error))

    def _token(self, choice: Choice) -> Token:
        text = self.decoder.token
        alternatives = tuple(Alternative(id, text(id), logprob) for id, logprob in choice.alternatives)
        return Token(choice.id, text(choice.id), choice.logprob, alternatives)
