"""What the routes of a server stand on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from overture.prompt import BaseModelId, SoftPrompt
from overture.serve.config import ServeConfig
from overture.serve.directory import Directory
from overture.serve.keys import Caller, KeyRing
from overture.serve.limits import Limits
from overture.serve.metrics import Metrics
from overture.serve.requests import Engine
from overture.store import PromptStore

__all__ = ["Asker", "House", "Service"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """One server."""

    config: ServeConfig
    engine: Engine
    store: PromptStore
    keys: KeyRing | None
    """None where keys are not asked for."""
    base: BaseModelId
    vocab_size: int
    """Token ids are below it."""
    nearest: Callable[[SoftPrompt], list[list[str]] | None] | None
    """Nearest words of virtual tokens, where there are any; called in a thread that may wait."""
    directory: Directory
    limits: Limits
    metrics: Metrics


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _caller(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


House = Annotated[Service, Depends(_service)]
"""The server, in a route's signature."""
Asker = Annotated[Caller, Depends(_caller)]
"""Who asks, in a route's signature."""
