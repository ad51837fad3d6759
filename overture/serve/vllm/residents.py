"""Which prompts the workers hold in host memory: counted by the scheduler, so that all workers hold the same ones."""

from __future__ import annotations

from collections import OrderedDict

from overture.serve.vllm.reference import Reference

__all__ = ["Residents"]


class Residents:
    """Prompts in the workers' memory within a budget; the least recently used goes first.

    Args:
        budget: most bytes of the whole model's keys and values. A prompt that somebody waits for is held in any case.
        bytes_per_token: bytes of one virtual token over all layers and heads.
    """

    def __init__(self, budget: int, bytes_per_token: int) -> None:
        self._budget, self._per_token = budget, bytes_per_token
        self._ready: OrderedDict[Reference, None] = OrderedDict()
        self._loading: dict[Reference, int] = {}
        self._bytes = 0

    def __contains__(self, reference: object) -> bool:
        """True if every worker has it now."""
        return reference in self._ready

    def use(self, reference: Reference) -> None:
        """Note that a request reads it."""
        self._ready.move_to_end(reference)

    def begin(self, reference: Reference) -> None:
        """Note that a request waits for it."""
        self._loading[reference] = self._loading.get(reference, 0) + 1

    def end(self, reference: Reference, *, failed: bool) -> None:
        """Note that the request waits no more: every worker has the prompt, or one of them could not load it."""
        self._loading[reference] -= 1
        if not self._loading[reference]:
            del self._loading[reference]
        if not failed and reference not in self._ready:
            self._ready[reference] = None
            self._bytes += reference.length * self._per_token

    def discard(self, reference: Reference) -> None:
        """Note that a worker turned out not to have it."""
        if reference in self._ready:
            del self._ready[reference]
            self._bytes -= reference.length * self._per_token

    def evict(self, busy: set[Reference]) -> tuple[Reference, ...]:
        """Give up what exceeds the budget, but nothing `busy` in this step. Returns what the workers shall forget."""
        gone: list[Reference] = []
        for reference in list(self._ready):
            if self._bytes <= self._budget:
                break
            if reference not in busy and reference not in self._loading:
                self.discard(reference)
                gone.append(reference)
        return tuple(gone)
