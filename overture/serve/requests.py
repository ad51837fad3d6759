"""What a server asks of its engine, and what comes back: plain values that both sides stand on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from overture.errors import OvertureError

__all__ = ["Address", "Alternative", "Ended", "Engine", "Event", "Job", "Piece", "Sampling", "Token"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen, and when to stop. The same seed gives the same text whoever else is answered."""

    max_tokens: int | None = None
    """New tokens at most, 1 or more; None for all that fit behind the text."""
    temperature: float = 1.0
    """0 takes the likeliest token; above 0 divides the logits."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that together have this probability, above 0 to 1."""
    top_k: int = 0
    """Sample from so many likeliest tokens; 0 for all."""
    seed: int = 0
    """Seed of the row's own generator."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    logprobs: int | None = None
    """Alternatives to report beside each token's own log-probability; None reports none, 0 the token's own."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of token ids."""
    presence_penalty: float = 0.0
    """Taken once from the logits of tokens that the answer has."""
    frequency_penalty: float = 0.0
    """Taken from the logits of tokens for each time that the answer has them."""


@dataclass(frozen=True, slots=True)
class Address:
    """One version of a prompt. Named by number, so that publishing or rolling back changes no answer under way."""

    tenant: str
    name: str
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One answer to write."""

    id: str
    """Unique among the jobs of an engine."""
    tenant: str
    """Who asked: tenants share the engine fairly."""
    item: object
    """A text, a list of messages, the columns of a prompt's template, or a tuple of token ids."""
    prompts: tuple[Address, ...]
    """None for the base model; several are joined in this order."""
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token that might have been chosen."""

    id: int
    text: str
    logprob: float
    """Natural logarithm of its probability under the model, before temperature and truncation."""


@dataclass(frozen=True, slots=True)
class Token:
    """A token of the answer."""

    id: int
    text: str
    logprob: float | None
    alternatives: tuple[Alternative, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """More of an answer. `text` is final: it holds no half character, and nothing that may become a stop text."""

    text: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Ended:
    """The last event of a job."""

    reason: Literal["stop", "length", "cancelled", "error"]
    prompt_tokens: int
    """Real tokens of the text; virtual tokens are not counted."""
    completion_tokens: int
    error: OvertureError | None = None
    """Why, if the reason is `error`."""


Event = Piece | Ended


@runtime_checkable
class Engine(Protocol):
    """What writes answers: many jobs at once, each as if it were alone."""

    @property
    def alive(self) -> bool:
        """Whether it takes jobs. One that broke, as with its device, never does again."""

    def submit(self, job: Job, deliver: Callable[[Event], None]) -> None:
        """Take a job on. `deliver` is called in the engine's thread, with `Ended` last; it must return at once."""

    def cancel(self, id: str) -> None:
        """Stop a job; its row is free for others at the next step. An unknown or ended job is left alone."""

    def close(self, *, drain: float) -> None:
        """Take no more jobs, finish those under way for at most `drain` seconds, cancel the rest."""
