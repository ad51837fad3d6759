"""Prompts ready for the rows' slots: compiled, joined, and in the form in which the model's layers keep them."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from overture.prompt import KVPrefix, SoftPrompt, VirtualTokens
from overture.runtime.compile import compile_prefixes
from overture.runtime.rotation import concatenated, shifted
from overture.serve.engine.cache import LayerShape
from overture.spec import execution_device
from overture.store.records import TierStats

__all__ = ["Prefixes"]

_Key = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    prefix: KVPrefix
    bytes: int
    alive: tuple[weakref.ref[SoftPrompt], ...]
    """When one of the prompts goes, as after an erasure, so does the entry."""


class Prefixes:
    """The prefixes used last, within a budget of bytes. One thread asks for them; prompts may go in any.

    Args:
        model: the base model.
        layers: what its layers keep.
        budget: most bytes to keep beside those of running rows.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[LayerShape], budget: int) -> None:
        self._model, self._layers, self._budget = model, layers, budget
        self._device = execution_device(model)
        self._entries: OrderedDict[_Key, _Entry] = OrderedDict()
        # Entered again where the garbage collector runs inside.
        self._lock = threading.RLock()
        self._bytes = self._hits = self._misses = self._evictions = 0

    def ready(self, prompts: tuple[SoftPrompt, ...]) -> KVPrefix | None:
        """The prefix of some prompts one behind another; None for none."""
        if not prompts:
            return None
        key = tuple(map(id, prompts))
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
                self._hits += 1
                return entry.prefix
            self._misses += 1
        prefix = self._made(prompts)
        self._keep(key, prompts, prefix)
        return prefix

    def stats(self) -> TierStats:
        """Counters since the start."""
        return TierStats(
            hits=self._hits,
            misses=self._misses,
            evictions=self._evictions,
            entries=len(self._entries),
            pinned=0,
            bytes=self._bytes,
            budget=self._budget,
        )

    @torch.no_grad()
    def _made(self, prompts: Sequence[SoftPrompt]) -> KVPrefix:
        pieces: list[KVPrefix] = []
        for prompt in prompts:
            value = prompt.value
            if isinstance(value, VirtualTokens):
                piece = compile_prefixes(self._model, [value])[0]
            else:
                piece = value.map(lambda t: t.to(self._device))
            pieces.append(shifted(self._model, piece, sum(piece.length for piece in pieces)) if pieces else piece)
        joined = pieces[0] if len(pieces) == 1 else concatenated(pieces)
        return replace(
            joined,
            keys=tuple(key.to(layer.device, layer.dtype) for key, layer in zip(joined.keys, self._layers, strict=True)),
            values=tuple(v.to(layer.device, layer.dtype) for v, layer in zip(joined.values, self._layers, strict=True)),
        )

    def _keep(self, key: _Key, prompts: Sequence[SoftPrompt], prefix: KVPrefix) -> None:
        size = sum(tensor.nbytes for tensor in prefix.tensors().values())
        if size > self._budget:
            return
        gone = tuple(weakref.ref(prompt, lambda _: self._drop(key)) for prompt in prompts)
        with self._lock:
            while self._bytes + size > self._budget:
                self._drop(next(iter(self._entries)))
                self._evictions += 1
            self._entries[key] = _Entry(prefix, size, gone)
            self._bytes += size

    def _drop(self, key: _Key) -> None:
        with self._lock:
            entry = self._entries.pop(key, None)
            if entry is not None:
                self._bytes -= entry.bytes
