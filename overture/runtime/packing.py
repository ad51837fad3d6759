"""Rows end to end: texts of different lengths as one row of input, without padding.

Between attention calls a position is computed by itself, so projections and the output layer read real tokens alone.
Only attention asks which row a token is of: there the rows are taken apart, answered as any batch is, and put
together again.

Shape suffixes: B rows, T longest text, N tokens of all rows, H heads (of queries, keys or values), D head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from overture.dispatch import AttentionFunction, AttentionHandler

__all__ = ["PackedAttention", "Packing"]


@dataclass(frozen=True, slots=True, eq=False)
class Packing:
    """Where each token of the one row belongs."""

    lengths: tuple[int, ...]
    """Tokens of each row."""
    place: Int[Tensor, " N"]
    """Where each token stands in the rows padded on the right, counting through all of them."""
    source: Int[Tensor, " BT"]
    """The token at each place of the padded rows. Behind a row's end stands its last one, which nothing looks at."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Packing:
        """Rows of these lengths, one behind another."""
        width, starts = max(lengths), [0, *accumulate(lengths)]
        place = [row * width + i for row, length in enumerate(lengths) for i in range(length)]
        source = [
            start + min(i, length - 1) for start, length in zip(starts, lengths, strict=False) for i in range(width)
        ]
        return cls(tuple(lengths), torch.tensor(place, device=device), torch.tensor(source, device=device))

    def positions(self, first: int, ahead: Int[Tensor, " B"] | None) -> Int[Tensor, "1 N"]:
        """Position ids of the tokens: each row's text stands behind what is `ahead` of it."""
        rows, columns = self.place // max(self.lengths), self.place % max(self.lengths)
        positions = columns + first if ahead is None else columns + first + ahead[rows]
        return positions[None]

    def apart(self, tensor: Float[Tensor, "1 H N D"]) -> Float[Tensor, "B H T D"]:
        """The rows beside one another, padded on the right."""
        spread: Tensor = _Apart.apply(tensor[0].transpose(0, 1), self.source, self.place)  # type: ignore[no-untyped-call]
        rows: Tensor = spread.unflatten(0, (len(self.lengths), -1))
        return rows.transpose(1, 2)

    def together(self, tensor: Float[Tensor, "B T H D"]) -> Float[Tensor, "1 N H D"]:
        """The rows end to end."""
        joined: Tensor = _Together.apply(tensor.flatten(0, 1), self.place)  # type: ignore[no-untyped-call]
        return joined[None]


class _Apart(torch.autograd.Function):
    # Indexing would add up the gradient of every place; what stands behind a row's end has none.
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, source: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return tokens.index_select(0, source)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, padded: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.places = padded.shape[0]
        return padded.index_select(0, place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.new_zeros(ctx.places, *grad.shape[1:]).index_copy_(0, ctx.saved_tensors[0], grad), None


class PackedAttention:
    """Attention handler of a pass over rows end to end.

    Args:
        handler: answers the rows beside one another.
        packing: which token is of which row.
        windows: by `id` of an attention module, the length of its sliding window.
    """

    def __init__(self, handler: AttentionHandler, packing: Packing, windows: Mapping[int, int]) -> None:
        self.handler, self.packing, self.windows = handler, packing, windows
        self.masks: dict[int, Tensor] = {}

    def attend(
        self,
        inner: AttentionFunction,
        module: nn.Module,
        query: Float[Tensor, "1 H N D"],
        key: Float[Tensor, "1 K N D"],
        value: Float[Tensor, "1 K N E"],
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Answer one attention call of the model; the mask it made for a single row is not read."""
        mask = self._mask(self.windows.get(id(module), 0), query)
        query, key, value = (self.packing.apart(tensor) for tensor in (query, key, value))
        output, _ = self.handler.attend(inner, module, query, key, value, mask, **kwargs)
        return self.packing.together(output), None

    def _mask(self, window: int, like: Tensor) -> Tensor:
        """What a token sees of its row's text, for layers with the same window; 0 for no window."""
        if window not in self.masks:
            positions = torch.arange(max(self.packing.lengths), device=like.device)
            distance = positions[:, None] - positions
            hidden = (distance < 0) | (distance >= (window or len(positions)))
            mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
            self.masks[window] = mask.masked_fill(hidden, torch.finfo(like.dtype).min)[None, None]
        return self.masks[window]
