"""One request to vLLM's server: who asks, and behind which prompt. Set by the doorway, read by what comes after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass

from overture.serve.vllm.reference import Reference

__all__ = ["VISIT", "Adapter", "Adapters", "Visit"]


@dataclass(frozen=True, slots=True)
class Adapter:
    """A prompt where vLLM expects a LoRA adapter: with its names for things, as far as its routes read them."""

    lora_name: str
    """What the answer calls the model."""
    base_model_name: str
    """`parent` in the list of models."""
    reference: Reference | None = None
    """None in a list."""

    @property
    def path(self) -> str:
        """`root` in the list of models."""
        return self.lora_name


@dataclass(frozen=True, slots=True)
class Visit:
    """What was found out about a request before vLLM reads it."""

    tenant: str
    """Whose cache it may share: the caller's, or that of nobody in particular."""
    asked: str | None = None
    """The model that it names, if that is a prompt."""
    adapter: Adapter | None = None
    listed: tuple[Adapter, ...] = ()
    """Prompts that the caller may name, for the list of models."""


_NOBODY = Visit("")
VISIT: ContextVar[Visit] = ContextVar("overture-visit", default=_NOBODY)


class Adapters(Mapping[str, Adapter]):
    """Takes the place of vLLM's dictionary of LoRA adapters: to each request, the prompt that it names is there.

    Nothing is looked up here: this is asked in the event loop, and the doorway has asked the store in a thread.
    """

    def __getitem__(self, name: str) -> Adapter:
        visit = VISIT.get()
        if visit.adapter is None or name != visit.asked:
            raise KeyError(name)
        return visit.adapter

    def __iter__(self) -> Iterator[str]:
        return (adapter.lora_name for adapter in VISIT.get().listed)

    def __len__(self) -> int:
        return len(VISIT.get().listed)

    def values(self) -> tuple[Adapter, ...]:  # type: ignore[override]
        """The prompts that the caller may name."""
        return VISIT.get().listed
