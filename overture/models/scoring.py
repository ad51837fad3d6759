"""Loss of a model on documents: in bits per byte for whole texts, in nats for completions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def token_losses(model: PreTrainedModel, ids: Sequence[int], *, bos: int, window: int = 384) -> torch.Tensor:
    """Loss of each token of a document in nats, `[len(ids)]`.

    Longer documents are read in windows that overlap by half, so that a token has at least half a window of context.
    """
    import torch

    row = torch.tensor([bos, *ids])
    losses = torch.zeros(len(ids))
    done = 0
    with torch.no_grad():
        for start in range(0, max(1, len(ids) - window // 2), window // 2):
            part = row[start : start + window + 1]
            logits = model(input_ids=part[None, :-1], use_cache=False).logits[0].float()
            found = torch.nn.functional.cross_entropy(logits, part[1:], reduction="none")
            losses[done : start + len(found)] = found[done - start :]
            done = start + len(found)
    return losses


def bits_per_byte(nats: float, size: int) -> float:
    """Bits per byte of a text of `size` bytes whose loss is `nats` in all."""
    return nats / math.log(2) / size
