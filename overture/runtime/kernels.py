"""Attention kernels that also give the log-sum-exp of the scores, and their backward passes.

torch's `scaled_dot_product_attention` runs the same kernels, but keeps the log-sum-exp to itself. Their backward passes
compute the weights anew as `exp(score - lse)`: with the output and the log-sum-exp over more keys than they are shown,
they give the exact gradient of these keys' share.

Shape suffixes: B rows, H query heads, K key/value heads, T queries, S keys, D head size.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["CpuFlash", "CudaEfficient", "CudaFlash", "Kernel", "Mask", "kernel_for"]

_FLASH_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_FLASH_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention.default
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
_EFFICIENT = torch.ops.aten._scaled_dot_product_efficient_attention.default
_EFFICIENT_BACKWARD = torch.ops.aten._scaled_dot_product_efficient_attention_backward.default

_HALF = (torch.float16, torch.bfloat16)
_LSE_ALIGNMENT = 32
_MASK_ALIGNMENT = 8


class Mask(NamedTuple):
    """An additive mask, and which queries it leaves without any key."""

    scores: Float[Tensor, "#B #H #T S"]
    hidden: Bool[Tensor, "#B #H #T"]


class Attended(NamedTuple):
    """What a kernel's forward pass gives."""

    output: Float[Tensor, "B H T D"]
    """Zero for queries without any key."""
    lse: Float[Tensor, "B H T"]
    """Natural log-sum-exp of the scores; -inf for queries without any key."""
    state: tuple[Any, ...]
    """What the kernel's own backward pass wants to see again."""


Inputs = tuple[Tensor, Tensor, Tensor]
"""Query, key and value, or their gradients."""


@runtime_checkable
class Kernel(Protocol):
    """A fused attention kernel. Keys and values may have fewer heads than queries; there is at least one key."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Mask | None, causal: bool, scale: float | None
    ) -> Attended:
        """Attend to the keys that the mask leaves; `causal` hides later keys and needs as many keys as queries."""
        ...

    def backward(
        self, grad: Tensor, inputs: Inputs, mask: Mask | None, attended: Attended, causal: bool, scale: float | None
    ) -> Inputs:
        """Gradients of query, key and value. Every `lse` must be above -inf here."""
        ...


def kernel_for(query: Tensor, mask: Mask | None) -> Kernel:
    """The kernel for this device, size and mask."""
    if query.device.type == "cpu":
        return CpuFlash()
    if mask is None and query.dtype in _HALF and query.shape[-1] <= 256:
        return CudaFlash()
    return CudaEfficient()


class CpuFlash:
    """Flash attention on the CPU: fp64, fp32, bf16 and fp16, masks of any broadcastable shape, grouped queries."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Mask | None, causal: bool, scale: float | None
    ) -> Attended:
        """See `Kernel`."""
        scores = None if mask is None else mask.scores
        heads = query.shape[1]
        if _packs(query, key, scores, causal):
            query = _packed(query, key.shape[1])
        output, lse = _FLASH_CPU(query, key, value, 0.0, causal, attn_mask=scores, scale=scale)
        output, lse = _unpacked(output, heads), _unpacked(lse, heads)
        # For a query that sees nothing the kernel answers an lse of 0.
        return Attended(output, lse if mask is None else lse.masked_fill(mask.hidden, -torch.inf), ())

    def backward(
        self, grad: Tensor, inputs: Inputs, mask: Mask | None, attended: Attended, causal: bool, scale: float | None
    ) -> Inputs:
        """See `Kernel`."""
        scores = None if mask is None else mask.scores
        query, key, value = inputs
        output, lse, heads = attended.output, attended.lse, query.shape[1]
        if _packs(query, key, scores, causal):
            grad, query, output, lse = (_packed(tensor, key.shape[1]) for tensor in (grad, query, output, lse))
        given = (grad, query, key, value, output, lse.contiguous())
        d_query, d_key, d_value = _FLASH_CPU_BACKWARD(*given, 0.0, causal, attn_mask=scores, scale=scale)
        return _unpacked(d_query, heads), d_key, d_value


def _packs(query: Tensor, key: Tensor, scores: Tensor | None, causal: bool) -> bool:
    """True if the query heads of one key head may stand as further queries of it: then its keys are read once."""
    alike = scores is None or scores.shape[1:3] == (1, 1)
    return query.shape[1] != key.shape[1] and alike and not causal


def _packed(tensor: Shaped[Tensor, "B H T *D"], kv_heads: int) -> Shaped[Tensor, "B K GT *D"]:
    packed: Tensor = tensor.unflatten(1, (kv_heads, -1)).flatten(2, 3)
    return packed


def _unpacked(tensor: Shaped[Tensor, "B K GT *D"], heads: int) -> Shaped[Tensor, "B H T *D"]:
    groups = heads // tensor.shape[1]
    unpacked: Tensor = tensor if groups == 1 else tensor.unflatten(2, (groups, -1)).flatten(1, 2)
    return unpacked


class CudaFlash:
    """Flash attention on a GPU: fp16 and bf16, no mask, grouped queries."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Mask | None, causal: bool, scale: float | None
    ) -> Attended:
        """See `Kernel`."""
        size = query.shape[-1]
        inputs = [_aligned(tensor) for tensor in (query, key, value)]
        output, lse, *state, _ = _FLASH(*inputs, 0.0, causal, False, scale=_scale(scale, size))
        return Attended(output[..., :size], lse, tuple(state))

    def backward(
        self, grad: Tensor, inputs: Inputs, mask: Mask | None, attended: Attended, causal: bool, scale: float | None
    ) -> Inputs:
        """See `Kernel`."""
        size = grad.shape[-1]
        given = [_aligned(tensor) for tensor in (grad, *inputs, attended.output)]
        *lengths, seed, offset = attended.state
        gradients = _FLASH_BACKWARD(
            *given, attended.lse.contiguous(), *lengths, 0.0, causal, seed, offset, scale=_scale(scale, size)
        )
        query, key, value = (gradient[..., :size] for gradient in gradients)
        return query, key, value


class CudaEfficient:
    """Memory-efficient attention on a GPU: fp32, fp16 and bf16, masks; keys are repeated for grouped queries."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Mask | None, causal: bool, scale: float | None
    ) -> Attended:
        """See `Kernel`."""
        batch, heads, queries, size = query.shape
        inputs = [_aligned(_repeated(tensor, heads)) for tensor in (query, key, value)]
        scores = None if mask is None else _aligned_mask(mask.scores, (batch, heads, queries, key.shape[2]))
        output, lse, *state = _EFFICIENT(*inputs, scores, True, 0.0, causal, scale=_scale(scale, size))
        output, lse = output[..., :size], lse[..., :queries]
        if mask is not None:
            output, lse = output.masked_fill(mask.hidden[..., None], 0), lse.masked_fill(mask.hidden, -torch.inf)
        return Attended(output, lse, tuple(state))

    def backward(
        self, grad: Tensor, inputs: Inputs, mask: Mask | None, attended: Attended, causal: bool, scale: float | None
    ) -> Inputs:
        """See `Kernel`."""
        batch, heads, queries, size = grad.shape
        kv_heads, keys = inputs[1].shape[1:3]
        query, key, value = (_aligned(_repeated(tensor, heads)) for tensor in inputs)
        scores = None if mask is None else _aligned_mask(mask.scores, (batch, heads, queries, keys))
        # The kernel reads the log-sum-exp in whole tiles; infinity makes the weights of the queries in between zero.
        lse = pad(attended.lse, (0, -queries % _LSE_ALIGNMENT), value=torch.inf)
        tensors = (_aligned(grad), query, key, value, scores, _aligned(attended.output), lse, *attended.state)
        gradients = _EFFICIENT_BACKWARD(*tensors, 0.0, [True, True, True, False], causal, scale=_scale(scale, size))
        d_query, d_key, d_value = (gradient[..., :size] for gradient in gradients[:3])
        return d_query, _summed(d_key, kv_heads), _summed(d_value, kv_heads)


def _scale(scale: float | None, size: int) -> float:
    """The scale that heads filled up to another size would get wrong."""
    return size**-0.5 if scale is None else scale


def _aligned(tensor: Float[Tensor, "B H T D"]) -> Float[Tensor, "B H T _D"]:
    """Heads filled up to a multiple of eight, which the kernels want."""
    return pad(tensor, (0, -tensor.shape[-1] % 8))


def _aligned_mask(scores: Tensor, shape: tuple[int, ...]) -> Float[Tensor, "B H T S"]:
    """Rows that begin at aligned addresses, as the kernel reads them."""
    keys = shape[-1]
    return pad(scores.expand(*scores.shape[:-1], keys), (0, -keys % _MASK_ALIGNMENT))[..., :keys].expand(shape)


def _repeated(tensor: Float[Tensor, "B K S D"], heads: int) -> Float[Tensor, "B H S D"]:
    return tensor if tensor.shape[1] == heads else tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


def _summed(gradient: Float[Tensor, "B H S D"], kv_heads: int) -> Float[Tensor, "B K S D"]:
    return gradient if gradient.shape[1] == kv_heads else gradient.unflatten(1, (kv_heads, -1)).sum(2)
