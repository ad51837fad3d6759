"""What the scheduler half of the connector tells the worker half at each step."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from overture.serve.vllm.reference import Reference

__all__ = ["Injection", "Plan", "slots"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Injection:
    """Keys and values for the blocks of one request."""

    request: str
    reference: Reference | None
    """None if the request is refused."""
    blocks: tuple[int, ...]
    """All blocks of the request so far, in order."""
    start: int
    """First position to write; those before it are in vLLM's own cache. The last is that of the last virtual token."""
    wait: bool
    """True if the request waits until the worker reports it; False if the coming forward pass reads the blocks."""


@dataclass
class Plan(KVConnectorMetadata):
    """One step's work."""

    injections: tuple[Injection, ...] = ()
    forget: tuple[Reference, ...] = ()
    """Copies that are to go, to make room for others."""


def slots(injection: Injection, stop: int, block_size: int) -> list[int]:
    """Where the positions from `injection.start` to `stop` lie in the paged cache."""
    return [
        injection.blocks[position // block_size] * block_size + position % block_size
        for position in range(injection.start, stop)
    ]
