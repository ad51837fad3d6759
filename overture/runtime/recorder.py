"""What attention is given, layer by layer.

Shape suffixes: B rows, H query heads, K key/value heads, T queries, S keys, D key size, E value size.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from overture import dispatch

__all__ = ["KeyValueRecorder"]


class KeyValueRecorder:
    """An attention handler that keeps every layer's keys and values, with their gradient."""

    def __init__(self) -> None:
        self.keys: list[Float[Tensor, "B K S D"]] = []
        self.values: list[Float[Tensor, "B K S E"]] = []

    def attend(
        self,
        inner: dispatch.AttentionFunction,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Keep, and answer as the model does."""
        self.keys.append(key)
        self.values.append(value)
        return inner(module, query, key, value, attention_mask, **kwargs)
