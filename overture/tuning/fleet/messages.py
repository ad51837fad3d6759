"""What a driver and its workers tell each other. All can be pickled; prompts travel as the bytes of files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from overture.errors import OvertureError
from overture.formats import native
from overture.methods import Method
from overture.prompt import BaseModelId
from overture.tuning.config import TuneConfig
from overture.tuning.data import Row
from overture.tuning.events import Event
from overture.tuning.results import TuneResult

__all__ = ["Crew", "Ended", "HandOut", "Load", "Message", "Ready", "Shipment", "Stopped"]

Load = Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]
"""Loads the base model and its tokenizer on a worker's own machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HandOut:
    """Users for one worker, and all it must know to tune them."""

    data: Mapping[str, Sequence[Row]]
    """Rows by user. They travel, so that workers need no way to the data."""
    dev: Mapping[str, Sequence[Row]]
    """Held-out rows by user, as far as there are any."""
    method: Method
    config: TuneConfig
    task: str | None
    slots: int | None
    memory: int | str | None
    folder: Path | None
    """Where the state of users in training is kept. Who takes the users over goes on from there if they can see it."""
    over: tuple[str, ...]
    """Users that this folder's state may know, and that are no longer to be tuned here."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker has loaded its model."""

    base: BaseModelId
    task: str
    host: str
    """The machine it runs on."""
    process: int
    """Its process there."""


@dataclass(frozen=True, slots=True)
class Shipment:
    """A finished user's result. The worker waits until it is confirmed; before that, nobody may take it for done."""

    data: bytes
    """The prompt file."""
    rest: Mapping[str, Any]
    """The other fields of the `TuneResult`."""

    @classmethod
    def of(cls, result: TuneResult) -> Shipment:
        """Pack a result."""
        rest = {field.name: getattr(result, field.name) for field in fields(result) if field.name != "prompt"}
        return cls(native.dumps(result.prompt), rest)

    def result(self) -> TuneResult:
        """Unpack it; the prompt is checked as a file is."""
        return TuneResult(prompt=native.loads(self.data, f"the prompt of {self.rest['name']!r}"), **self.rest)


@dataclass(frozen=True, slots=True)
class Ended:
    """The worker is through with its users."""

    failures: Mapping[str, OvertureError]


@dataclass(frozen=True, slots=True)
class Stopped:
    """The worker cannot go on, for a reason that is no one user's: the run ends with it."""

    error: OvertureError


Message = Event | Ready | Shipment | Ended | Stopped


@runtime_checkable
class Crew(Protocol):
    """Workers, by number, wherever they run."""

    def hire(self) -> int:
        """Start one more worker; it says `Ready` when it has loaded its model."""
        ...

    def present(self) -> set[int]:
        """Workers that were hired and are not known to be dead."""
        ...

    def give(self, worker: int, users: HandOut) -> None:
        """Let a worker that is ready and idle tune users."""
        ...

    def confirm(self, worker: int, name: str) -> None:
        """Tell a worker that a result is where it belongs."""
        ...

    def wait(self, seconds: float) -> list[tuple[int, list[Message] | None]]:
        """What workers have said since the last call; None from one that is dead, once. Waits at most so long."""
        ...
