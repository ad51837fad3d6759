"""A deterministic engine for tests: it answers `word0 word1 ...` and knows what it was asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from overture.errors import ContextLengthError, OvertureError
from overture.prompt import BaseModelId
from overture.serve.requests import Address, Alternative, Ended, Event, Job, Piece, Token
from overture.store import PromptStore

BASE = BaseModelId(architecture="llama", digest="0123456789abcdef" * 4, name="tiny")
VOCAB = 61


@dataclass(frozen=True)
class ToyStats:
    """What the toy says of itself."""

    rows: int


@dataclass
class Toy:
    """Words say which prompts answer and with which seed, so that a mix-up is seen in the text."""

    store: PromptStore
    pace: float = 0.0
    """Seconds for a word."""
    longest: int = 50
    """Words that fit into the model's context."""
    alive: bool = True
    jobs: list[Job] = field(default_factory=list)
    cancelled: set[str] = field(default_factory=set)
    ended: dict[str, Ended] = field(default_factory=dict)

    def submit(self, job: Job, deliver: Callable[[Event], None]) -> None:
        self.jobs.append(job)
        threading.Thread(target=self._write, args=(job, deliver), daemon=True).start()

    def cancel(self, id: str) -> None:
        self.cancelled.add(id)

    def close(self, *, drain: float) -> None:
        self.cancelled |= {job.id for job in self.jobs}

    def stats(self) -> ToyStats:
        return ToyStats(rows=len(self.jobs) - len(self.ended))

    def _write(self, job: Job, deliver: Callable[[Event], None]) -> None:
        read = len(str(job.item).split())
        wrote = 0
        try:
            if read > self.longest:
                raise ContextLengthError(expected="a shorter text", got=f"{read} words", do="shorten it")
            for address in job.prompts:
                self.store.get(address.tenant, address.name, address.version, base=BASE)
        except OvertureError as error:
            end = Ended("error", 0, 0, error)
        else:
            most = min(job.sampling.max_tokens or 8, self.longest - read)
            reason = "length"
            for number in range(most):
                if job.id in self.cancelled:
                    reason = "cancelled"
                    break
                time.sleep(self.pace)
                text = self.word(job, number)
                if text.strip() in job.sampling.stop:
                    reason = "stop"
                    break
                wrote += 1
                deliver(Piece(text, (self._token(job, number, text),)))
            end = Ended(reason, read, wrote)  # type: ignore[arg-type]
        self.ended[job.id] = end
        deliver(end)

    def _token(self, job: Job, number: int, text: str) -> Token:
        if job.sampling.logprobs is None:
            return Token(number, text, None)
        others = tuple(Alternative(i, f"o{i}", -2.0 - i) for i in range(job.sampling.logprobs))
        return Token(number, text, -0.5, others)

    @staticmethod
    def word(job: Job, number: int) -> str:
        return f"{'+'.join(map(said, job.prompts)) or 'base'}:{job.sampling.seed % 97}:{number} "


def said(address: Address) -> str:
    """How the toy writes a version."""
    return f"{address.tenant}/{address.name}@{address.version}"
