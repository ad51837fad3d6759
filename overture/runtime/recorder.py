"""What attention is given, layer by layer.

Shape suffixes: B rows, H query heads, K key/value heads, T queries, S keys, D key size, E value size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from overture.dispatch import AttentionWitness

__all__ = ["KeyValueRecorder"]


class KeyValueRecorder(AttentionWitness):
    """Keeps every layer's keys and values, with their gradient."""

    def __init__(self) -> None:
        self.keys: list[Float[Tensor, "B K S D"]] = []
        self.values: list[Float[Tensor, "B K S E"]] = []

    def note(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]) -> None:
        """Keep one layer's."""
        self.keys.append(key)
        self.values.append(value)
