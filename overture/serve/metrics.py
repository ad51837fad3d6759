"""What a server counts, for Prometheus. Tenants are named only where that was asked for; prompts never are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from overture.serve.config import ServeConfig
from overture.serve.limits import Limits
from overture.serve.requests import Engine
from overture.store import PromptStore, TierStats

__all__ = ["Metrics", "engine_figures", "tiers"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters of one server, in a registry of their own.

    Args:
        config: whether tenants are named.
        engine: its `stats()`, if it has any, are shown.
        store: its tiers' hits and sizes are shown.
        limits: how many answers are under way.
    """

    def __init__(self, config: ServeConfig, engine: Engine, store: PromptStore, limits: Limits) -> None:
        self.registry = CollectorRegistry()
        self._named = config.tenant_labels
        tenant = ["tenant"] if self._named else []
        self._requests = Counter(
            "overture_requests", "Requests answered.", ["route", "status", *tenant], registry=self.registry
        )
        self._seconds = Histogram(
            "overture_request_seconds", "Time of a request.", ["route"], buckets=_SECONDS, registry=self.registry
        )
        self._first = Histogram(
            "overture_first_token_seconds", "Time to a request's first token.", buckets=_SECONDS, registry=self.registry
        )
        self._tokens = Counter("overture_tokens", "Real tokens.", ["kind", *tenant], registry=self.registry)
        under_way = Gauge("overture_answers", "Answers under way or waiting.", registry=self.registry)
        under_way.set_function(lambda: limits.answers)
        self.registry.register(_Tiers(engine, store))

    def request(self, route: str, status: int, seconds: float, tenant: str | None) -> None:
        """Count a request that was answered; `route` is a pattern and names nobody."""
        self._requests.labels(route, str(status), *self._of(tenant)).inc()
        self._seconds.labels(route).observe(seconds)

    def first_token(self, seconds: float) -> None:
        """Count the time to a first token."""
        self._first.observe(seconds)

    def tokens(self, read: int, written: int, tenant: str | None) -> None:
        """Count the tokens of an answer."""
        self._tokens.labels("prompt", *self._of(tenant)).inc(read)
        self._tokens.labels("completion", *self._of(tenant)).inc(written)

    def render(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def _of(self, tenant: str | None) -> list[str]:
        return [tenant or ""] if self._named else []


def engine_figures(engine: Engine) -> dict[str, float]:
    """What the engine says of itself: the numbers of its `stats()`."""
    return {name: value for name, value in _said(engine).items() if isinstance(value, int | float)}


def tiers(engine: Engine, store: PromptStore) -> dict[str, TierStats]:
    """Every place where copies of prompts are kept: host memory, devices, and the engine's own."""
    stats = store.stats()
    own = {name: value for name, value in _said(engine).items() if isinstance(value, TierStats)}
    return {"memory": stats.memory, **stats.devices, **own}


def _said(engine: Engine) -> dict[str, Any]:
    stats = getattr(engine, "stats", None)
    found = stats() if callable(stats) else None
    fields = dataclasses.fields(found) if dataclasses.is_dataclass(found) else ()
    return {field.name: getattr(found, field.name) for field in fields}


class _Tiers(Collector):
    """Figures that others keep, asked for when Prometheus asks."""

    def __init__(self, engine: Engine, store: PromptStore) -> None:
        self._engine, self._store = engine, store

    def collect(self) -> Iterator[Metric]:
        for name, value in engine_figures(self._engine).items():
            yield GaugeMetricFamily(f"overture_engine_{name}", f"The engine's {name.replace('_', ' ')}.", value)
        found = tiers(self._engine, self._store)
        for name in ("hits", "misses", "evictions", "entries", "bytes", "budget"):
            family = GaugeMetricFamily(f"overture_tier_{name}", f"A tier's {name}.", labels=["tier"])
            for tier, figures in found.items():
                family.add_metric([tier], getattr(figures, name))
            yield family
