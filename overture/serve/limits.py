"""How much a tenant may ask for, and how much the server takes on at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from overture.serve.config import ServeConfig
from overture.serve.refusal import Refusal

__all__ = ["Limits", "Permit"]


@dataclass(slots=True)
class _Account:
    """One tenant's requests."""

    left: float
    """Requests it may send now."""
    since: float
    """When that was true."""
    answers: int = 0
    """Answers under way or waiting."""


class Limits:
    """Counts requests and answers. For one event loop: nothing here waits, so nothing needs a lock.

    Args:
        config: how many of each.
        clock: seconds, never going back.
    """

    def __init__(self, config: ServeConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock = config, clock
        self._accounts: dict[str, _Account] = {}
        self.answers = 0
        """Answers of all tenants under way or waiting."""

    def admit(self, tenant: str, answers: int) -> Permit:
        """Let a request in.

        Args:
            tenant: who asks.
            answers: how many answers it wants; with 0 it counts as a request alone.

        Returns:
            What is given back at the end.

        Raises:
            Refusal: too many, with the time after which there may be room.
        """
        now, config = self._clock(), self._config
        account = self._accounts.setdefault(tenant, _Account(config.requests_per_minute, now))
        rate = config.requests_per_minute / 60
        account.left = min(config.requests_per_minute, account.left + (now - account.since) * rate)
        account.since = now
        if answers > min(config.choices, config.concurrency, config.queue):
            most = min(config.choices, config.concurrency, config.queue)
            raise Refusal(
                400, f"A request may ask for {most} answers at most, and this one asks for {answers}.", param="n"
            )
        if account.left < 1:
            message = f"More than {config.requests_per_minute} requests in a minute. Wait a little."
            raise Refusal(429, message, code="rate_limit_exceeded", retry_after=(1 - account.left) / rate)
        if account.answers + answers > config.concurrency:
            message = f"More than {config.concurrency} answers at once. Wait for some of them to end."
            raise Refusal(429, message, code="concurrency_limit_exceeded", retry_after=1.0)
        if self.answers + answers > config.queue:
            raise Refusal(429, "The server is busy. Wait a little.", code="server_busy", retry_after=2.0)
        account.left -= 1
        account.answers += answers
        self.answers += answers
        return Permit(self, tenant, answers)

    def give_back(self, tenant: str, answers: int) -> None:
        """Count answers as ended."""
        self.answers -= answers
        self._accounts[tenant].answers -= answers


class Permit:
    """Leave for some answers; give it back when they have ended."""

    def __init__(self, limits: Limits, tenant: str, answers: int) -> None:
        self._limits, self._tenant, self._answers = limits, tenant, answers

    def release(self) -> None:
        """Give back what is still held."""
        held, self._answers = self._answers, 0
        self._limits.give_back(self._tenant, held)
