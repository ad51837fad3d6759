"""Prompts ready for the rows' slots: compiled, joined, and in the form in which the model's layers keep them."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from overture.prompt import KVPrefix, SoftPrompt
from overture.runtime.host import Host
from overture.runtime.rotation import concatenated, shifted
from overture.serve.engine.cache import LayerShape
from overture.serve.engine.front import Compilation, Front
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
        # By the prompt's id; whoever waits for one holds it. However many do, it is read once.
        self._compilations: weakref.WeakValueDictionary[int, Compilation] = weakref.WeakValueDictionary()
        # Entered again where the garbage collector runs inside.
        self._lock = threading.RLock()
        self._bytes = self._hits = self._misses = self._evictions = 0

    def front(self, prompts: tuple[SoftPrompt, ...]) -> Front:
        """What is there of some prompts, and what has to be read first."""
        with self._lock:
            prefix = self._kept(prompts)
            self._hits += prefix is not None
            self._misses += prefix is None and bool(prompts)
        return Front(prompts, () if prefix is not None else tuple(map(self._piece, prompts)), prefix)

    def ready(self, front: Front) -> KVPrefix | None:
        """The prefix of prompts of which nothing is cold; None for none.

        Raises:
            OvertureError: one of them could not be read, or they cannot be joined.
        """
        if front.prefix is None and front.prompts:
            prefix = self._kept(front.prompts)
            if prefix is None:
                prefix = self._joined(front.pieces)
                self._keep(front.prompts, prefix)
            front.prefix, front.pieces = prefix, ()
        return front.prefix

    def finish(self, compilation: Compilation) -> None:
        """Keep what has been read of a prompt."""
        assert compilation.place is not None
        compilation.result = compilation.place.shelf.taken(compilation)
        self._keep((compilation.prompt,), compilation.result)

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

    def _piece(self, prompt: SoftPrompt) -> KVPrefix | Compilation:
        if isinstance(prompt.value, KVPrefix):
            return prompt.value
        kept = self._kept((prompt,))
        if kept is not None:
            return kept
        compilation = self._compilations.get(id(prompt))
        if compilation is None or compilation.error is not None:
            compilation = self._compilations[id(prompt)] = Compilation.of(prompt)
        return compilation

    @torch.no_grad()
    def _joined(self, pieces: Sequence[KVPrefix | Compilation]) -> KVPrefix:
        placed: list[KVPrefix] = []
        for piece in pieces:
            if isinstance(piece, Compilation):
                if piece.error is not None:
                    raise piece.error
                assert piece.result is not None
                piece = piece.result
            piece = piece.map(lambda t: t.to(self._device))
            if placed:
                piece = shifted(self._model, Host.of(self._model), piece, sum(p.length for p in placed))
            placed.append(piece)
        joined = placed[0] if len(placed) == 1 else concatenated(placed)
        return replace(
            joined,
            keys=tuple(key.to(layer.device, layer.dtype) for key, layer in zip(joined.keys, self._layers, strict=True)),
            values=tuple(v.to(layer.device, layer.dtype) for v, layer in zip(joined.values, self._layers, strict=True)),
        )

    def _kept(self, prompts: tuple[SoftPrompt, ...]) -> KVPrefix | None:
        key = tuple(map(id, prompts))
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
            return entry.prefix

    def _keep(self, prompts: tuple[SoftPrompt, ...], prefix: KVPrefix) -> None:
        key, size = tuple(map(id, prompts)), sum(tensor.nbytes for tensor in prefix.tensors().values())
        if size > self._budget:
            return
        gone = tuple(weakref.ref(prompt, lambda _: self._drop(key)) for prompt in prompts)
        with self._lock:
            self._drop(key)
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
