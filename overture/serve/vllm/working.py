"""The connector's worker half: writes prompts into vLLM's paged cache.

Shape suffixes: N positions of all requests of a step, K this worker's key/value heads, D head size.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future
from typing import Any

import torch

from overture.errors import OvertureError
from overture.serve.vllm.loading import Loader, Share
from overture.serve.vllm.plan import Injection, Plan, slots

__all__ = ["WorkerHalf"]

log = logging.getLogger(__name__)


class WorkerHalf:
    """Writes through each layer's own `do_kv_cache_update`: how a backend lays its cache out is its own business.

    Args:
        loader: this worker's copies of prompts.
        layers: vLLM's attention layers, in the order of the copies' layers.
        block_size: positions of a block.
    """

    def __init__(self, loader: Loader, layers: list[Any], block_size: int) -> None:
        self._loader, self._layers, self._block_size = loader, layers, block_size
        self._waiting: list[tuple[Injection, Future[Share]]] = []
        self._ended: set[str] = set()
        self._invalid: set[int] = set()

    def step(self, plan: Plan) -> None:
        """Start what is to be loaded, and write what is here: whatever this step reads, and loads that have ended."""
        for reference in plan.forget:
            self._loader.forget(reference)
        ready: list[tuple[Injection, Share]] = []
        for injection in plan.injections:
            if injection.reference is None:
                self._fail(injection)
            elif injection.wait:
                self._waiting.append((injection, self._loader.begin(injection.reference)))
            elif (share := self._loader.ready(injection.reference)) is not None:
                ready.append((injection, share))
            else:
                log.error("The prompt %s is not in memory, where it was to be", injection.reference.address)
                self._invalid.update(injection.blocks)
        self._write(ready + self._arrived())

    def ended(self) -> set[str]:
        """Requests that wait no more, each reported once."""
        ended, self._ended = self._ended, set()
        return ended

    def invalid_blocks(self) -> set[int]:
        """Blocks of requests whose prompt could not be loaded, each reported once."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    def close(self) -> None:
        """Stop loading."""
        self._loader.close()

    def _arrived(self) -> list[tuple[Injection, Share]]:
        arrived: list[tuple[Injection, Share]] = []
        waiting, self._waiting = self._waiting, []
        for injection, copy in waiting:
            if not copy.done():
                self._waiting.append((injection, copy))
                continue
            error = copy.exception()
            if error is None:
                self._ended.add(injection.request)
                arrived.append((injection, copy.result()))
            else:
                # Whatever went wrong, this request is the only one to suffer.
                log.error("Request %s: %s", injection.request, error, exc_info=_unexpected(error))
                self._fail(injection)
        return arrived

    def _fail(self, injection: Injection) -> None:
        self._ended.add(injection.request)
        self._invalid.update(injection.blocks)

    def _write(self, ready: list[tuple[Injection, Share]]) -> None:
        if not ready:
            return
        places: list[int] = []
        for injection, _ in ready:
            assert injection.reference is not None
            places += slots(injection, injection.reference.length, self._block_size)
        device = self._layers[0].kv_cache.device
        slot_mapping_N = torch.tensor(places, dtype=torch.int64).to(device, non_blocking=True)
        for number, layer in enumerate(self._layers):
            pairs = [(share[number], injection.start) for injection, share in ready]
            key_NKD = _joined([pair[0][start:] for pair, start in pairs]).to(device, non_blocking=True)
            value_NKD = _joined([pair[1][start:] for pair, start in pairs]).to(device, non_blocking=True)
            layer.impl.do_kv_cache_update(layer, key_NKD, value_NKD, layer.kv_cache, slot_mapping_N)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _unexpected(error: BaseException) -> BaseException | None:
    """The error if its trace says more than its message."""
    return None if isinstance(error, OvertureError) else error
