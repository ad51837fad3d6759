"""Cross-entropy over a large vocabulary, with the scores of a few positions at a time.

The output embedding is frozen, so of its scores only the gradient of the hidden states is needed. It is computed as
soon as the scores are there, and they are forgotten: neither pass ever holds [positions, vocabulary] numbers.

Shape suffixes: N positions, C of them in a chunk, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

__all__ = ["chunked_cross_entropy", "precise"]

_SCORES = 2**22
"""Numbers in a chunk of scores, about."""
_LEAST = 64
"""Positions in a chunk; with fewer, reading the output embedding would be the work."""


def chunked_cross_entropy(
    head: nn.Module, hidden: Float[Tensor, "N hidden"], wanted: Int[Tensor, " N"], vocabulary: int
) -> Float[Tensor, " N"]:
    """Cross-entropy (nats) of each position's wanted token, with gradient to the hidden states alone.

    Args:
        head: a frozen output embedding: hidden states to scores, every position by itself.
        hidden: what it is given.
        wanted: a token for every position.
        vocabulary: scores of a position, by which chunks are sized.

    Returns:
        [N], in fp32 at least.
    """
    size = max(_LEAST, _SCORES // vocabulary)
    losses: Tensor = _Losses.apply(hidden, wanted, head, size, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return losses


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, wanted: Tensor, head: nn.Module, size: int, learning: bool) -> Tensor:
        work = _with_slopes if learning and ctx.needs_input_grad[0] else _alone
        parts = [work(head, h, w) for h, w in zip(hidden.split(size), wanted.split(size), strict=True)]
        losses, *slopes = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        ctx.save_for_backward(*slopes)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return slopes * grad[:, None].to(slopes.dtype), None, None, None, None


def _alone(head: nn.Module, hidden: Tensor, wanted: Tensor) -> tuple[Tensor]:
    """Losses of some positions."""
    return (cross_entropy(precise(head(hidden)), wanted, reduction="none"),)


def _with_slopes(head: nn.Module, hidden: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of some positions, and the gradient of each one's own hidden state."""
    with torch.enable_grad():
        hidden = hidden.detach().requires_grad_()
        scores: Tensor = head(hidden)
    with torch.no_grad():
        shares = precise(scores).log_softmax(-1)
        chosen = wanted[:, None]
        losses = -shares.gather(1, chosen)[:, 0]
        # The gradient of the scores: the share of every token, less one for the wanted one.
        slope = shares.exp_().scatter_add_(1, chosen, shares.new_tensor(-1.0).expand_as(chosen))
    return losses, torch.autograd.grad(scores, hidden, slope.to(scores.dtype))[0]


def precise(scores: Tensor) -> Tensor:
    """Scores in fp32 at least, for a loss."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
