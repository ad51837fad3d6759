"""The attention seam: every row attends to its own prefix, then to its text.

There are two paths. The reference joins prefix keys and values in front of each row's own, behind an explicit mask, and
calls the model's own attention function. The merge path (`runtime/merge.py`) attends to both apart.

Shape suffixes: B rows, U distinct prompts, G groups of rows, H heads, K key/value heads, T queries, S keys, P longest
prefix, D head size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache, DynamicLayer

from overture.dispatch import AttentionFunction, AttentionWitness
from overture.errors import UnsupportedModelError
from overture.runtime import merge
from overture.runtime.cached import PrefixedLayer, keeps
from overture.runtime.kernels import Mask
from overture.runtime.moved import Moved
from overture.runtime.rows import Fold, PrefixRows

__all__ = ["CallOrder", "Path", "PlainAttention", "PrefixAttention"]

Path = Literal["auto", "merge", "concatenate"]
"""How prefix and text come together: `merge` demands the merge path, `auto` takes it where it is possible and pays."""


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


class PlainAttention(AttentionWitness):
    """Attention handler of a forward pass whose prompts stand in the text: it changes nothing, and marks the pass."""

    def note(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]) -> None:
        """Nothing."""


class PrefixAttention:
    """Attention handler of one forward pass.

    It reads nothing but its own fields and the call's arguments, so a recomputation in the backward pass repeats
    exactly what the forward pass did.

    Args:
        rows: the batch's prefixes.
        layers: by `id` of an attention module, the layers that its calls stand for, in order; other modules are left
            alone.
        path: how prefix and text come together.
        windows: by layer, the sliding window that a prefix drops out of; elsewhere every query sees it.
        positions: of the queries, counted from the beginning of the row's prefix; only windows need them.
        moved: of a decoder behind an encoder, how far its text stands behind prefixes that count.
        cache: what keeps the text's keys and values, if it may keep the prefix in front of them.
    """

    def __init__(
        self,
        rows: PrefixRows,
        layers: Mapping[int, Sequence[int]],
        *,
        path: Path = "auto",
        windows: Mapping[int, int] | None = None,
        positions: Int[Tensor, "#B T"] | None = None,
        moved: Moved | None = None,
        cache: DynamicCache | None = None,
    ) -> None:
        self.rows = rows
        self.order = CallOrder(layers)
        self.path = path
        self.windows = windows or {}
        self.positions = positions
        self.moved = moved
        self.cache = cache
        self.kept: dict[Any, Any] = {}

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
        """Answer one attention call of the model."""
        layer = self.order.next(module)
        longest = 0 if layer is None else self.rows.longest(layer)
        if layer is None or longest == 0:
            return inner(module, query, key, value, attention_mask, **kwargs)
        causal = kwargs.get("is_causal")
        causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
        queries = query.shape[2]
        bias = kwargs.get("position_bias")
        if bias is not None:
            kwargs["position_bias"] = self._biased(bias, module, layer)
        place = self._place(module)
        given = place.given if isinstance(place, PrefixedLayer) else None
        if given is not None and key is given[0] and value is given[1]:
            # The prefix stands in front of the text in the cache by now.
            mask = self._joined(attention_mask, query, key.shape[2], causal, layer)
            key, value = place.joined()
            return inner(module, query, key, value, mask, **kwargs)
        if attention_mask is None and causal and 1 < queries < key.shape[2]:
            # "No mask" over a longer cache means an empty static cache being filled: what follows is not text yet.
            key, value = key[:, :, :queries], value[:, :, :queries]
        if self.path != "concatenate":
            obstacle = "a prefix inside a sliding window" if layer in self.windows else None
            obstacle = obstacle or merge.obstacle(inner, query, key, value, attention_mask, kwargs)
            if obstacle is None and (self.path == "merge" or merge.pays(query, key, longest)):
                return self._merged(layer, query, key, value, attention_mask, causal, kwargs.get("scaling")), None
            if self.path == "merge":
                raise UnsupportedModelError(
                    expected="attention that can be merged, for attention='merge'",
                    got=f"{obstacle} in {type(module).__name__}",
                    do="use attention='auto', which concatenates where it must",
                )
        mask = self._joined(attention_mask, query, key.shape[2], causal, layer)
        if type(place) is DynamicLayer and key is place.keys and value is place.values and keeps(self.rows, layer):
            assert self.cache is not None
            prefixed = PrefixedLayer(layer, self.rows)
            self.cache.layers[self.cache.layers.index(place)] = prefixed
            key, value = prefixed.take_over(place)
        else:
            key, value = (
                torch.cat([self.rows.chosen(stack[layer], like=text), text], 2)
                for stack, text in ((self.rows.keys, key), (self.rows.values, value))
            )
        return inner(module, query, key, value, mask, **kwargs)

    def _place(self, module: nn.Module) -> Any:
        """What keeps the keys and values of this call; None if the prefix may not stand there."""
        index = getattr(module, "layer_idx", None)
        if self.cache is None or index is None or torch.compiler.is_compiling():
            return None
        return self.cache.layers[index] if index < len(self.cache.layers) else None

    def _merged(
        self,
        layer: int,
        query: Float[Tensor, "B H T D"],
        key: Float[Tensor, "B K S D"],
        value: Float[Tensor, "B K S D"],
        mask: Tensor | None,
        causal: bool,
        scale: float | None,
    ) -> Float[Tensor, "B T H D"]:
        dtype, fold, part = merge.computed_in(query), self.rows.fold(layer), self.rows.parts[layer]
        assert fold is not None
        prefix_key, prefix_value = (
            fold.of_groups(stack[layer]).to(key.device, dtype) for stack in (self.rows.keys, self.rows.values)
        )
        output = merge.attend(
            query.to(dtype),
            key.to(dtype),
            value.to(dtype),
            prefix_key,
            prefix_value,
            fold=fold,
            text_mask=None if mask is None else self._once("text", mask, lambda: merge.additive(mask, dtype)),
            prefix_mask=self._once(("prefix", part), None, lambda: _ends(fold, prefix_key)),
            causal=mask is None and causal and query.shape[2] > 1,
            scale=scale,
        )
        return output.transpose(1, 2).contiguous()

    def _biased(self, bias: Tensor, module: nn.Module, layer: int) -> Tensor:
        """The bias of positions over prefix and text."""
        longest = self.rows.longest(layer)
        if self.moved is None or self.rows.parts[layer] != "decoder":
            return pad(bias, (longest, 0))  # the prefix stands at no position relative to the text
        return self.moved.bias(module, bias, longest)

    def _joined(self, mask: Any, query: Tensor, keys: int, causal: bool, layer: int) -> Any:
        """The mask over prefix and text. Layers of one part that share a mask share the joined one."""
        queries = query.shape[2]
        if mask is None and self._is_plain(layer) and (queries == 1 or not causal):
            return None
        signature = ("joined", queries, keys, causal, self.rows.parts[layer], self.windows.get(layer))
        if isinstance(mask, BlockMask):
            return self._once(signature, mask, lambda: _join_blocks(mask, self._visible(layer, queries), queries, keys))
        return self._once(signature, mask, lambda: self._join(mask, query, keys, causal, layer))

    def _join(self, mask: Tensor | None, query: Tensor, keys: int, causal: bool, layer: int) -> Tensor:
        queries = query.shape[2]
        if mask is None:
            text = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
            mask = _like(text.tril() if causal and queries > 1 else text, query)[None, None]
        visible = self._visible(layer, queries).to(mask.device)
        if mask.dtype != torch.bool:
            visible = _like(visible, mask)
        batch, heads, queries = visible.shape[0], mask.shape[1], mask.shape[2]
        return torch.cat([visible.expand(-1, heads, queries, -1), mask.expand(batch, -1, -1, -1)], dim=-1)

    def _is_plain(self, layer: int) -> bool:
        """Whether every query sees all of the prefix."""
        return self.rows.uniform[self.rows.parts[layer]] and layer not in self.windows

    def _visible(self, layer: int, queries: int) -> Bool[Tensor, "B 1 _T P"]:
        """Which positions of its prefix each query sees."""
        visible = self.rows.visible(layer)[:, None, None]
        window = self.windows.get(layer)
        if window is None:
            return visible
        assert self.positions is not None
        # Later layers may be asked for the last positions only (Gemma 4's, that share keys).
        positions = self.positions[..., -queries:, None]
        distance = positions - torch.arange(visible.shape[-1], device=positions.device)
        return visible & (distance < window)[:, None].to(visible.device)

    def _once(self, kind: Any, mask: Any, make: Callable[[], Any]) -> Any:
        """What was made of this mask before, by this pass; compiled code makes it anew and finds out by itself."""
        if torch.compiler.is_compiling():
            return make()
        signature = (kind, id(mask))
        if signature not in self.kept:
            # The mask is kept beside the result, so that its id stays its own.
            self.kept[signature] = (mask, make())
        return self.kept[signature][1]


def _ends(fold: Fold, keys: Float[Tensor, "G K P D"]) -> Mask | None:
    """Hides what fills up the shorter prefixes; None where nothing does."""
    if fold.lengths is None:
        return None
    visible = torch.arange(keys.shape[2], device=keys.device) < fold.lengths.to(keys.device)[:, None]
    return merge.additive(visible[:, None, None], keys.dtype)


def _join_blocks(mask: BlockMask, visible: Bool[Tensor, "B 1 _T P"], queries: int, keys: int) -> BlockMask:
    """The mask over prefix and text as flex attention takes it: a rule for each pair of positions."""
    longest, visible = visible.shape[-1], visible.expand(-1, 1, queries, -1).contiguous()
    of_text = mask.mask_mod

    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # Both sides are looked up for every key, so neither may be asked for a place it does not have.
        in_prefix = visible[row, 0, query, key.clamp(max=longest - 1)]
        return torch.where(key < longest, in_prefix, of_text(row, head, query, (key - longest).clamp(min=0)))

    return create_block_mask(seen, len(visible), None, queries, longest + keys, device=visible.device)


def _like(seen: Tensor, like: Tensor) -> Tensor:
    """A boolean mask as an additive one in the dtype of `like`."""
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill(~seen, torch.finfo(like.dtype).min)
