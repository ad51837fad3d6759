"""`/v1/models`: the base model and prompts, which OpenAI's clients see as models."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

__all__ = ["Card", "Model", "ModelList"]


class Card(BaseModel):
    """What is known of a prompt."""

    version: int
    """The version that answers now."""
    kind: str
    """`kv_prefix` or `virtual_tokens`."""
    num_virtual_tokens: int
    """Its length, P."""
    bytes: int
    """Size of its file."""
    shared: bool
    """Whether it is another tenant's, open to all."""
    metrics: dict[str, Any]
    """What was measured while tuning."""
    method: dict[str, Any] | None = None
    """How it was tuned; only where one model is asked for, as all below."""
    parameters: int | None = None
    """Numbers it consists of."""
    template: str | None = None
    """Where its virtual tokens stand, if not in front of the text."""
    nearest_words: list[list[str]] | None = None
    """Of each virtual token, the words of the vocabulary that lie nearest."""


class Model(BaseModel):
    """A model to name in a request: the base model, or a prompt with the base as its parent."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    parent: str | None = None
    prompt: Card | None = Field(default=None, description="Not OpenAI's.")


class ModelList(BaseModel):
    """All models that the caller may name."""

    object: Literal["list"] = "list"
    data: list[Model]
