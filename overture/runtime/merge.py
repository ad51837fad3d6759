"""The merge path: text and prefix attended to apart, each by a fused kernel, and joined by their log-sum-exps.

Nothing is concatenated, rows that share a prefix read it from one place, and where the model has no mask, there is
none. The gradient is exact: the kernels' backward passes, given the joined output and the joined log-sum-exp, compute
each part's share of it (as in ring attention, arXiv:2310.01889).

Shape suffixes: B rows, G groups of rows that share a prompt, H heads, K key/value heads, T queries, S keys, P longest
prefix, D head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from overture.dispatch import AttentionFunction
from overture.runtime.kernels import Attended, Mask, kernel_for
from overture.runtime.rows import Fold

__all__ = ["additive", "attend", "computed_in", "obstacle", "pays"]

_HALF = (torch.bfloat16, torch.float16)
_DTYPES = (torch.float64, torch.float32, *_HALF)
_COPIED = 2**18
_MANY_QUERIES = 256
_LONG_PREFIX = 64
_READ = {"module", "query", "key", "value", "attention_mask", "scaling", "is_causal", "kwargs"}
# What else transformers' `sdpa` function takes, dropout for one, changes the weights in ways that are not joined here.
_REFUSED = sorted(
    set(inspect.signature(sdpa_attention_forward).parameters) - _READ | {"softcap", "output_attentions", "s_aux"}
)


def obstacle(
    inner: AttentionFunction,
    query: Float[Tensor, "B H T D"],
    key: Float[Tensor, "B K S D"],
    value: Float[Tensor, "B K S E"],
    mask: Any,
    options: Mapping[str, Any],
) -> str | None:
    """Why this call of the model's attention function cannot be merged; None if it can."""
    if inner is not sdpa_attention_forward:
        return f"attention by {getattr(inner, '__name__', 'another function')}"
    if 0 in query.shape or 0 in key.shape:
        # The kernels divide by sizes; some end the process then.
        return "no queries or no keys"
    for name in _REFUSED:
        option = options.get(name)
        if isinstance(option, Tensor) or option:
            return name
    if query.shape[3] != value.shape[3]:
        return "keys and values of different sizes"
    if mask is not None and (mask.ndim != 4 or mask.requires_grad):
        return "a mask with gradient, or of another form than [rows, heads, queries, keys],"
    if query.dtype not in _DTYPES or (not query.dtype == key.dtype == value.dtype and not _autocasts(query)):
        return f"queries, keys and values in {query.dtype}, {key.dtype} and {value.dtype}"
    return None


def pays(query: Float[Tensor, "B H T D"], key: Float[Tensor, "B K S D"], prefix: int) -> bool:
    """True if merging was the faster path where this was measured (docs/log.md).

    A second kernel costs as much as copying some hundred thousand numbers, or as attending to a short prefix.

    Args:
        query: of all rows.
        key: of the text.
        prefix: length of the longest prefix.
    """
    if query.device.type != "cpu":
        return False
    if query.shape[2] == 1:
        rows, heads, keys, size = key.shape
        return 2 * rows * heads * (keys + prefix) * size >= _COPIED
    if query.dtype in _HALF:
        return query.shape[2] >= 2 * _MANY_QUERIES
    return query.shape[2] >= _MANY_QUERIES or prefix >= _LONG_PREFIX


def computed_in(query: Tensor) -> torch.dtype:
    """The dtype in which `scaled_dot_product_attention` would run."""
    return torch.get_autocast_dtype(query.device.type) if _autocasts(query) else query.dtype


def _autocasts(query: Tensor) -> bool:
    return torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64


def attend(
    query: Float[Tensor, "B H T D"],
    key: Float[Tensor, "B K S D"],
    value: Float[Tensor, "B K S D"],
    prefix_key: Float[Tensor, "G K P D"],
    prefix_value: Float[Tensor, "G K P D"],
    *,
    fold: Fold,
    text_mask: Mask | None,
    prefix_mask: Mask | None,
    causal: bool,
    scale: float | None,
) -> Float[Tensor, "B H T D"]:
    """Attend to each row's prefix and text.

    Args:
        query: of all rows.
        key: of the text.
        value: of the text.
        prefix_key: of each group's prefix.
        prefix_value: of each group's prefix.
        fold: which row belongs to which group.
        text_mask: the model's mask over the text.
        prefix_mask: hides what fills up shorter prefixes; None if there are none.
        causal: no text mask, and no query sees a later key.
        scale: of the scores; None for one over the root of the head size.
    """
    arguments = (query, key, value, prefix_key, prefix_value, (text_mask, prefix_mask), fold, causal, scale)
    if torch.is_grad_enabled():
        return _Merge.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]
    return _joined(*_parts(*arguments))


def additive(mask: Tensor, dtype: torch.dtype) -> Mask:
    """A boolean or additive mask for kernels that compute in `dtype`."""
    if mask.dtype == torch.bool:
        scores = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)
        return Mask(scores, ~mask.any(dim=-1))
    return Mask(mask.to(dtype), (mask == -torch.inf).all(dim=-1))


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        masks: tuple[Mask | None, Mask | None],
        fold: Fold,
        causal: bool,
        scale: float | None,
    ) -> Tensor:
        text, prefix = _parts(query, key, value, prefix_key, prefix_value, masks, fold, causal, scale)
        output, lse = _joined(text, prefix), torch.logaddexp(text.lse, prefix.lse)
        # Above -inf also where a query sees nothing: the weights, exp(-inf - lse), are zero then, and not NaN.
        lse = lse.clamp(min=torch.finfo(lse.dtype).min)
        ctx.save_for_backward(query, key, value, prefix_key, prefix_value, output, lse)
        ctx.masks, ctx.fold, ctx.causal, ctx.scale = masks, fold, causal, scale
        ctx.states = text.state, prefix.state
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, prefix_key, prefix_value, output, lse = ctx.saved_tensors
        for_query, for_key, for_value, for_prefix_key, for_prefix_value = ctx.needs_input_grad[:5]
        d_query = d_key = d_value = d_prefix_key = d_prefix_value = None
        if for_query or for_key or for_value:
            mask, joined = ctx.masks[0], Attended(output, lse, ctx.states[0])
            d_query, d_key, d_value = kernel_for(query, mask).backward(
                grad, (query, key, value), mask, joined, ctx.causal, ctx.scale
            )
        if for_query or for_prefix_key or for_prefix_value:
            fold, mask = ctx.fold, ctx.masks[1]
            folded = fold.gathered(query)
            # An endless log-sum-exp makes every weight zero: nothing comes from places without a row.
            joined = Attended(fold.gathered(output), fold.gathered(lse, empty=torch.inf), ctx.states[1])
            d_folded, d_prefix_key, d_prefix_value = kernel_for(folded, mask).backward(
                fold.gathered(grad), (folded, prefix_key, prefix_value), mask, joined, False, ctx.scale
            )
            if d_query is not None:
                d_query = d_query + fold.scattered(d_folded)
        return d_query, d_key, d_value, d_prefix_key, d_prefix_value, None, None, None, None


def _parts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    masks: tuple[Mask | None, Mask | None],
    fold: Fold,
    causal: bool,
    scale: float | None,
) -> tuple[Attended, Attended]:
    """What each row finds in its text, and what in its prefix."""
    text = kernel_for(query, masks[0]).forward(query, key, value, masks[0], causal, scale)
    folded = fold.gathered(query)
    output, lse, state = kernel_for(folded, masks[1]).forward(folded, prefix_key, prefix_value, masks[1], False, scale)
    return text, Attended(fold.scattered(output), fold.scattered(lse, without=-torch.inf), state)


def _joined(text: Attended, prefix: Attended) -> Float[Tensor, "B H T D"]:
    """Each part's output by its share of the weights."""
    # The difference of two -inf, where a query sees nothing, is no number; both outputs are zero there.
    share = torch.sigmoid(prefix.lse - text.lse).nan_to_num()[..., None]
    return torch.lerp(text.output.to(share.dtype), prefix.output.to(share.dtype), share).to(text.output.dtype)
