"""The attention seam: prefix keys and values joined in front of each row's own, behind an explicit mask.

Shape suffixes: B rows, H heads, K key/value heads, T queries, S keys, P longest prefix, D head size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad

from overture.dispatch import AttentionFunction
from overture.errors import UnsupportedModelError
from overture.runtime.rows import PrefixRows

__all__ = ["CallOrder", "PrefixAttention"]


class CallOrder:
    """Which attention layer each call of one forward pass stands for.

    Args:
        layers: by `id` of a module, the indices of the layers that its calls stand for, in order. Most modules serve
            one layer; ALBERT's only one serves them all.
    """

    def __init__(self, layers: Mapping[int, Sequence[int]]) -> None:
        self.layers = layers
        self.calls: Counter[int] = Counter()

    def copy(self) -> CallOrder:
        """The same state, to go on from more than once."""
        other = CallOrder(self.layers)
        other.calls = self.calls.copy()
        return other

    def next(self, module: nn.Module) -> int | None:
        """The layer of this call of `module`; None if it serves no layer.

        Raises:
            UnsupportedModelError: a module of several layers is called again after the last of them.
        """
        layers = self.layers.get(id(module), ())
        if len(layers) <= 1:
            # Recomputation repeats the call; it is the same layer every time.
            return layers[0] if layers else None
        call = self.calls[id(module)]
        self.calls[id(module)] += 1
        if call >= len(layers):
            raise UnsupportedModelError(
                expected=f"{len(layers)} attention calls of the shared {type(module).__name__} in one forward pass",
                got="one more, as when gradient checkpointing repeats them in an order of its own",
                do="turn gradient checkpointing off: model.gradient_checkpointing_disable()",
            )
        return layers[call]


class PrefixAttention:
    """Attention handler of one forward pass: every row attends to its own prefix, then to its text.

    It reads nothing but its own fields and the call's arguments, so a recomputation in the backward pass repeats
    exactly what the forward pass did. A prefix is seen by every query, also beyond a sliding window.

    Args:
        rows: the batch's prefixes.
        layers: by `id` of an attention module, the layers that its calls stand for, in order; other modules are left
            alone.
    """

    def __init__(self, rows: PrefixRows, layers: Mapping[int, Sequence[int]]) -> None:
        self.rows = rows
        self.order = CallOrder(layers)
        self.masks: dict[tuple[int, int, int, str], tuple[Tensor | None, Tensor | None]] = {}

    def attend(
        self,
        inner: AttentionFunction,
        module: nn.Module,
        query: Float[Tensor, "B H T D"],
        key: Float[Tensor, "B K S D"],
        value: Float[Tensor, "B K S E"],
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Call the model's own attention function on prefix and text together."""
        layer = self.order.next(module)
        if layer is None or self.rows.longest(layer) == 0:
            return inner(module, query, key, value, attention_mask, **kwargs)
        causal = kwargs.get("is_causal")
        causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
        queries = query.shape[2]
        if attention_mask is None and causal and 1 < queries < key.shape[2]:
            # "No mask" over a longer cache means an empty static cache being filled: what follows is not text yet.
            key, value = key[:, :, :queries], value[:, :, :queries]
        mask = self._joined(attention_mask, query, key.shape[2], causal, layer)
        prefix_key, prefix_value = (
            self._chosen(self.rows.keys[layer], key),
            self._chosen(self.rows.values[layer], value),
        )
        bias = kwargs.get("position_bias")
        if bias is not None:
            # A prefix stands at no position relative to the text.
            kwargs["position_bias"] = pad(bias, (self.rows.longest(layer), 0))
        return inner(
            module, query, torch.cat([prefix_key, key], 2), torch.cat([prefix_value, value], 2), mask, **kwargs
        )

    def _chosen(self, stacked: Float[Tensor, "U K P D"], like: Tensor) -> Float[Tensor, "B K P D"]:
        choice = self.rows.choice
        if stacked.shape[0] == 1:
            return stacked.to(like).expand(len(choice), -1, -1, -1)
        return stacked.to(like).index_select(0, choice.to(like.device))

    def _joined(self, mask: Tensor | None, query: Tensor, keys: int, causal: bool, layer: int) -> Tensor | None:
        """The mask over prefix and text. Layers of one part that share a mask share the joined one."""
        signature = (id(mask), query.shape[2], keys, self.rows.parts[layer])
        if signature not in self.masks:
            # The mask is kept beside the result, so that its id stays its own.
            self.masks[signature] = (mask, self._join(mask, query, keys, causal, layer))
        return self.masks[signature][1]

    def _join(self, mask: Tensor | None, query: Tensor, keys: int, causal: bool, layer: int) -> Tensor | None:
        queries = query.shape[2]
        if mask is None:
            if self.rows.uniform[self.rows.parts[layer]] and (queries == 1 or not causal):
                return None
            text = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
            mask = _like(text.tril() if causal and queries > 1 else text, query)[None, None]
        visible = self.rows.visible(layer).to(mask.device)[:, None, None, :]
        if mask.dtype != torch.bool:
            visible = _like(visible, mask)
        batch, heads, queries = visible.shape[0], mask.shape[1], mask.shape[2]
        return torch.cat([visible.expand(-1, heads, queries, -1), mask.expand(batch, -1, -1, -1)], dim=-1)


def _like(seen: Tensor, like: Tensor) -> Tensor:
    """A boolean mask as an additive one in the dtype of `like`."""
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill(~seen, torch.finfo(like.dtype).min)
