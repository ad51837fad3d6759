"""Prompts from the store into a worker's memory, in background threads: the step path reads no disk.

Shape suffixes: P virtual tokens, K this worker's key/value heads, D head size.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from overture.errors import BaseMismatchError, PromptFileError, StoreError, UnknownPromptError, UnsupportedModelError
from overture.prompt import KVPrefix
from overture.serve.vllm.reference import Reference
from overture.store import PromptStore

__all__ = ["Layer", "Loader", "Share", "is_stored", "stored_prefix"]

_SWEEP_SECONDS = 10.0
"""How long what was erased may stay in memory."""

Share = list[tuple[Tensor, Tensor]]
"""What a worker needs of a prompt: for each of its layers keys and values, [P, K, D], in the dtype of the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One of the worker's attention layers."""

    index: int
    """Among all layers of the model, in the order of calls."""
    heads: int
    """Key/value heads here."""
    key_size: int
    value_size: int


def stored_prefix(store: PromptStore, reference: Reference) -> KVPrefix:
    """The prefix that a reference names.

    Raises:
        UnknownPromptError: it was removed.
        PromptFileError: its file is missing or damaged, or another prompt by now.
        UnsupportedModelError: it is no prefix.
    """
    prompt = store.get(reference.tenant, reference.name, reference.version)
    # A version's content never changes; a name that was removed and made again has other versions.
    found = store.record(reference.tenant, reference.name, reference.version).sha256
    if found != reference.sha256:
        raise PromptFileError(
            expected=f"the prompt {reference.address} with the SHA-256 {reference.sha256[:12]}",
            got=f"one with {found[:12]}",
            do="ask again: the name was made anew a moment ago",
        )
    if not isinstance(prompt.value, KVPrefix):
        raise UnsupportedModelError(
            expected="keys and values",
            got=f"virtual tokens in {reference.address}",
            do="compile it with `overture store compile`",
        )
    return prompt.value


def is_stored(store: PromptStore, reference: Reference) -> bool:
    """Whether the store has what a reference names. A store that cannot be asked just now says nothing against it."""
    try:
        return store.record(reference.tenant, reference.name, reference.version).sha256 == reference.sha256
    except UnknownPromptError:
        return False
    except StoreError:
        return True


class Loader:
    """A worker's copies of prompts.

    Args:
        fetch: reads one; called in a thread.
        layers: the worker's attention layers.
        total: attention layers of the whole model.
        rank: the worker's place among those that divide the heads,
        world: and how many these are.
        dtype: of the model's keys and values.
        pin: keep copies in pinned memory, from which a device copies without waiting.
        threads: prompts to read at once.
        live: whether a prompt is still what it was; asked in a thread from time to time, so that what was erased from
            the store leaves the memory, too.
    """

    def __init__(
        self,
        fetch: Callable[[Reference], KVPrefix],
        layers: list[Layer],
        *,
        total: int,
        rank: int = 0,
        world: int = 1,
        dtype: torch.dtype,
        pin: bool = False,
        threads: int = 4,
        live: Callable[[Reference], bool] = lambda reference: True,
    ) -> None:
        self._fetch, self._layers, self._total = fetch, layers, total
        self._rank, self._world, self._dtype, self._pin = rank, world, dtype, pin
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="overture-load")
        self._copies: dict[Reference, Future[Share]] = {}
        self._lock = threading.Lock()
        self._live, self._closed = live, threading.Event()
        threading.Thread(target=self._watch, name="overture-watch", daemon=True).start()

    def begin(self, reference: Reference) -> Future[Share]:
        """Load a prompt unless it is here or on its way. A load that failed is tried again."""
        with self._lock:
            copy = self._copies.get(reference)
            if copy is None or (copy.done() and copy.exception() is not None):
                copy = self._copies[reference] = self._pool.submit(self._load, reference)
            return copy

    def ready(self, reference: Reference) -> Share | None:
        """The copy if it is here."""
        copy = self._copies.get(reference)
        return copy.result() if copy is not None and copy.done() and copy.exception() is None else None

    def forget(self, reference: Reference) -> None:
        """Drop a copy."""
        with self._lock:
            self._copies.pop(reference, None)

    def sweep(self) -> None:
        """Drop copies of prompts that are not what they were. Who asks for one is refused, and the next loads anew."""
        for reference in [r for r, copy in list(self._copies.items()) if copy.done()]:
            if not self._live(reference):
                self.forget(reference)

    def close(self) -> None:
        """Stop the threads."""
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _watch(self) -> None:
        while not self._closed.wait(_SWEEP_SECONDS):
            self.sweep()

    def _load(self, reference: Reference) -> Share:
        prefix = self._fetch(reference)
        if len(prefix.keys) != self._total or prefix.length != reference.length or prefix.parts is not None:
            raise BaseMismatchError(
                expected=f"keys and values of {self._total} layers, {reference.length} virtual tokens",
                got=f"{len(prefix.keys)} layers, {prefix.length} virtual tokens in {reference.address}",
                do="serve the model that the prompt was tuned on",
            )
        return [
            (
                self._part(prefix.keys[layer.index], layer.heads, layer.key_size, reference),
                self._part(prefix.values[layer.index], layer.heads, layer.value_size, reference),
            )
            for layer in self._layers
        ]

    def _part(self, whole: Tensor, heads: int, size: int, reference: Reference) -> Tensor:
        """This worker's heads. Where workers outnumber heads, neighbours hold the same one."""
        first = self._rank * whole.shape[0] // self._world
        part = whole[first : first + heads]
        if part.shape[0] != heads or part.shape[2] != size:
            raise BaseMismatchError(
                expected=f"{heads} heads of size {size} for worker {self._rank} of {self._world}",
                got=f"{tuple(whole.shape)} (heads, P, size) in {reference.address}",
                do="serve the model that the prompt was tuned on",
            )
        part = part.transpose(0, 1).to(self._dtype).contiguous()
        return part.pin_memory() if self._pin else part
