"""The words of a vocabulary that lie nearest to virtual tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from overture.prompt import VirtualTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["nearest_words"]

_CHUNK = 16_384


@torch.no_grad()
def nearest_words(
    tokens: VirtualTokens,
    look_up: Callable[[Tensor], Tensor],
    size: int,
    tokenizer: PreTrainedTokenizerBase,
    count: int = 5,
) -> list[list[tuple[str, float]]]:
    """The vocabulary's nearest words to every virtual token.

    Args:
        tokens: virtual tokens in the space of the model's input embeddings, on the model's device.
        look_up: from token ids to their embeddings, in any one scale.
        size: token ids are below it.
        tokenizer: the model's tokenizer.
        count: words per token.

    Returns:
        Per virtual token, (word, cosine) with the nearest first.

    Source: Prompt Tuning (arXiv:2104.08691), section 7.
    """
    own_PD = normalize(tokens.embeddings.float(), dim=-1)
    chunks = [torch.arange(i, min(i + _CHUNK, size), device=own_PD.device) for i in range(0, size, _CHUNK)]
    cosine_PV = torch.cat([own_PD @ normalize(look_up(ids).float(), dim=-1).T for ids in chunks], dim=1)
    best = cosine_PV.topk(min(count, size), dim=1)
    return [
        [(str(tokenizer.decode([i])), round(cosine, 4)) for i, cosine in zip(ids, cosines, strict=True)]
        for ids, cosines in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
