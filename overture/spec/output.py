"""What a language model does to the scores of its output embedding before it gives them away."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from overture.spec.modules import execution_device, measuring
from overture.spec.settled import once_settled

__all__ = ["gives_plain_logits"]


@once_settled
def gives_plain_logits(model: PreTrainedModel) -> bool:
    """True if a decoder's logits are what its output embedding computes, with no scale, cap or other dtype behind it.

    Then they can be had of some positions at a time. Found by running the model on one token.
    """
    computed: list[Any] = []
    copies: list[Tensor] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        computed.append(output)
        if isinstance(output, Tensor):
            copies.append(output.clone())

    handle = model.get_output_embeddings().register_forward_hook(note)
    try:
        with measuring(model):
            given = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=execution_device(model))).logits
    finally:
        handle.remove()
    if len(computed) != 1 or len(copies) != 1 or given.data_ptr() != computed[0].data_ptr():
        return False
    # At the same place there may be fewer of them (Inkling cuts off padding), or others (Chameleon rules tokens out).
    return torch.equal(given, copies[0])
