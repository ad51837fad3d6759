"""From what is trained to what is stored."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from overture.prompt import BlockInputs, KVPrefix, Value, VirtualTokens
from overture.runtime.compile import compile_prefixes

__all__ = ["fold"]


@torch.no_grad()
def fold(model: PreTrainedModel, value: VirtualTokens | KVPrefix | BlockInputs) -> Value:
    """A trained prompt as it is stored: networks folded away, block inputs compiled, fp32 on the CPU."""
    stored = compile_prefixes(model, [value])[0] if isinstance(value, BlockInputs) else value
    return stored.map(lambda t: t.detach().float().cpu().contiguous())
