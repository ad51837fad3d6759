"""The other side: one prompt tuned by PEFT in the shortest loop that trains it rightly.

No Trainer, no data loader, nothing logged: batches are tensors before the clock starts, the base model is frozen and in
evaluation mode, and AdamW is torch's fused one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

import overture as ov
from overture.methods import Method
from overture.tuning.example import TextExample

__all__ = ["Batch", "PeftTrainee", "batch_of"]

Batch = dict[str, Tensor]


def batch_of(examples: Sequence[TextExample], device: torch.device) -> Batch:
    """Rows as a data collator would give them: padded on the right, labels where a token is learned."""
    width = max(len(example) for example in examples)

    def filled(columns: Sequence[Sequence[int]], empty: int) -> Tensor:
        return torch.tensor([[*column, *[empty] * (width - len(column))] for column in columns], device=device)

    labels = [[token if target else -100 for token, target in zip(e.ids, e.targets, strict=True)] for e in examples]
    return {
        "input_ids": filled([e.ids for e in examples], 0),
        "attention_mask": filled([[1] * len(e) for e in examples], 0),
        "labels": filled(labels, -100),
    }


class PeftTrainee:
    """One prompt of PEFT's and its optimizer.

    Args:
        model: the frozen base model.
        method: Overture's method, of which PEFT gets the counterpart.
        rate: step size.
    """

    def __init__(self, model: PreTrainedModel, method: Method, rate: float) -> None:
        length = method.num_virtual_tokens
        config = (
            PrefixTuningConfig(
                task_type="CAUSAL_LM",
                num_virtual_tokens=length,
                prefix_projection=method.reparameterization,
                encoder_hidden_size=method.reparameterization_hidden,
            )
            if isinstance(method, ov.PrefixTuning)
            else PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length)
        )
        self.model: PeftModel = get_peft_model(model, config).eval()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=0.0, fused=True)

    def step(self, batch: Batch) -> None:
        """One step on one batch."""
        loss = self.model(**batch).loss
        loss.backward()
        clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
