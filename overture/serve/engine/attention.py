"""The attention of one step: every row's new tokens are written into its slot and attend to what stands there.

A step has no batch dimension and no padding: the tokens of all rows stand in one line, those of rows that write and
those of texts that are read. Only here are they told apart.

Shape suffixes: N tokens of the step, n tokens of a group, R rows of a group, T queries of a row, S positions, H heads,
K key/value heads, D key size, E value size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from overture.dispatch import AttentionFunction
from overture.runtime.attention import CallOrder, PrefixAttention
from overture.runtime.rows import Fold, PrefixRows
from overture.serve.engine.cache import Shelf

__all__ = ["CachedAttention", "Group"]


_PART = "self"


@dataclass(eq=False)
class Group:
    """Rows in neighbouring slots of one shelf, and their new tokens."""

    shelf: Shelf
    first: int
    """The first row's slot."""
    starts: Sequence[int]
    """Per row, positions that its slot holds."""
    counts: Sequence[int]
    """Per row, new tokens."""
    heads: Sequence[int]
    """Per row, positions at the beginning of its slot that are its prefix."""
    masks: dict[Any, Tensor] = field(default_factory=dict)
    sent: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Find where every token belongs, once for all layers."""
        self.tokens = sum(self.counts)
        self.queries = max(self.counts)
        self.positions = max(start + count for start, count in zip(self.starts, self.counts, strict=True))
        self.alike = len(set(self.counts)) == 1
        pairs = [
            (row, start + i)
            for row, (start, count) in enumerate(zip(self.starts, self.counts, strict=True))
            for i in range(count)
        ]
        self.rows, self.places = torch.tensor(pairs).T.contiguous()
        self.numbers = self.places - torch.tensor(self.starts)[self.rows]

    def places_on(self, device: torch.device) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        """Each token's slot and its position there; sent to a device once."""
        if device not in self.sent:
            self.sent[device] = (self.rows + self.first).to(device), self.places.to(device)
        return self.sent[device]

    def padded(self, tokens: Float[Tensor, "H n D"]) -> Float[Tensor, "R H T D"]:
        """The tokens of each row as a row; behind its end something."""
        if self.alike:
            rows: Tensor = tokens.unflatten(1, (len(self.counts), self.queries))
            return rows.transpose(0, 1)
        filled = tokens.new_zeros(len(self.counts), self.queries, tokens.shape[0], tokens.shape[2])
        filled[self.rows, self.numbers] = tokens.transpose(0, 1)
        return filled.transpose(1, 2)

    def flat(self, rows: Float[Tensor, "R T H E"]) -> Float[Tensor, "n H E"]:
        """The inverse, of what attention answers."""
        return rows.flatten(0, 1) if self.alike else rows[self.rows, self.numbers]

    def mask(self, window: int | None, like: Tensor, *, required: bool) -> Float[Tensor, "R 1 T S"] | None:
        """What each query sees of its slot: its prefix, and the text up to itself as far as a sliding window reaches.

        Args:
            window: length of the layer's sliding window.
            like: a tensor of the mask's type and device.
            required: False if no mask means causal.
        """
        reaches = window is None or window >= self.positions
        # A mask of nothing may look useless for one query, but it makes transformers pack grouped heads: faster.
        if not required and reaches and self.queries > 1 and not any(self.starts):
            return None
        signature = (None if reaches else window, like.dtype, like.device)
        if signature not in self.masks:
            seen = self._seen(None if reaches else window).to(like.device)
            scores = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
            self.masks[signature] = scores.masked_fill_(~seen, -torch.inf)[:, None]
        return self.masks[signature]

    def beside(self, layers: Mapping[int, Sequence[int]]) -> PrefixAttention | None:
        """What answers for rows that share a prefix."""
        prefix = self.shelf.prefix
        if prefix is None:
            return None
        rows, device = len(self.counts), prefix.keys[0].device
        shared = PrefixRows(
            keys=tuple(key[None] for key in prefix.keys),
            values=tuple(value[None] for value in prefix.values),
            parts=(_PART,) * len(prefix.keys),
            choice=torch.zeros(rows, dtype=torch.long, device=device),
            lengths={_PART: torch.full((rows,), prefix.length, device=device)},
            uniform={_PART: True},
            folds={_PART: Fold.of([0] * rows, [prefix.length] * rows, device)},
        )
        return PrefixAttention(shared, layers)

    def _seen(self, window: int | None) -> Bool[Tensor, "R T S"]:
        queries = torch.tensor(self.starts)[:, None] + torch.arange(self.queries)
        keys = torch.arange(self.positions)
        seen = keys <= queries[..., None]
        if window is None:
            return seen
        near = queries[..., None] - keys < window
        return seen & (near | (keys < torch.tensor(self.heads)[:, None, None]))


class CachedAttention:
    """Attention handler of one step.

    Args:
        groups: in the order of the tokens.
        layers: by `id` of an attention module, the layers that its calls stand for.
        windows: by layer, the length of its sliding window.
    """

    def __init__(
        self, groups: Sequence[Group], layers: Mapping[int, Sequence[int]], windows: Mapping[int, int]
    ) -> None:
        self.groups, self.order, self.windows = groups, CallOrder(layers), windows
        self.beside = [group.beside(layers) for group in groups]

    def attend(
        self,
        inner: AttentionFunction,
        module: nn.Module,
        query: Float[Tensor, "1 H N D"],
        key: Float[Tensor, "1 K N D"],
        value: Float[Tensor, "1 K N E"],
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "1 N H E"], None]:
        """Answer one attention call of the model."""
        layer = self.order.next(module)
        assert layer is not None
        found, end = [], 0
        for group, beside in zip(self.groups, self.beside, strict=True):
            start, end = end, end + group.tokens
            parts = (tensor[0, :, start:end] for tensor in (query, key, value))
            function = inner if beside is None else partial(beside.attend, inner)
            required = inner is not sdpa_attention_forward
            found.append(self._answer(function, module, group, layer, *parts, required=required, **kwargs))
        return torch.cat(found)[None], None

    def _answer(
        self,
        inner: AttentionFunction,
        module: nn.Module,
        group: Group,
        layer: int,
        query: Float[Tensor, "H n D"],
        key: Float[Tensor, "K n D"],
        value: Float[Tensor, "K n E"],
        *,
        required: bool,
        **kwargs: Any,
    ) -> Float[Tensor, "n H E"]:
        keys, values = group.shelf.keys[layer], group.shelf.values[layer]
        slots, places = group.places_on(key.device)
        at = slots, slice(None), places
        keys[at], values[at] = key.transpose(0, 1).to(keys.dtype), value.transpose(0, 1).to(values.dtype)
        window = slice(group.first, group.first + len(group.counts)), slice(None), slice(group.positions)
        mask = group.mask(self.windows.get(layer), query, required=required)
        answer, _ = inner(
            module,
            group.padded(query),
            keys[window].to(query.dtype),
            values[window].to(query.dtype),
            mask,
            **kwargs,
        )
        return group.flat(answer)
