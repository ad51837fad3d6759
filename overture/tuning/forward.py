"""One forward pass over rows of many prompts: losses at the target positions only.

Shape suffixes: B rows, T text, N target positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from overture.runtime.encode import Encoded, batch_rows
from overture.runtime.prompts import RowPrompt, prompts
from overture.spec import evaluating, execution_device
from overture.tuning.example import Example

__all__ = ["collate", "frozen", "row_losses"]


def collate(examples: Sequence[Example], filler: int) -> Encoded:
    """Examples as one batch, padded on the right."""
    return batch_rows([(list(e.ids), None if e.slots is None else list(e.slots)) for e in examples], filler, "right")


def row_losses(
    model: PreTrainedModel, rows: Sequence[RowPrompt], examples: Sequence[Example], *, filler: int = 0
) -> Float[Tensor, " B"]:
    """Sum of the losses (nats) over each row's target tokens, under the row's own prompt.

    Args:
        model: the frozen causal language model.
        rows: one prompt per example.
        examples: one per row; the first token of a row is never a target.
        filler: token id that stands in the padding.

    Returns:
        [B], fp32, differentiable with respect to the prompts.
    """
    batch = collate(examples, filler).to(execution_device(model))
    row, column = _targets(examples, execution_device(model))
    with prompts(model, rows, batch), _selected_positions(model, row, column - 1):
        logits: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    losses = cross_entropy(logits.flatten(0, -2).float(), batch.input_ids[row, column], reduction="none")
    return losses.new_zeros(len(examples)).index_add(0, row, losses)


def _targets(examples: Sequence[Example], device: torch.device) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
    places = [(r, c) for r, example in enumerate(examples) for c, target in enumerate(example.targets) if target and c]
    row, column = torch.tensor(places, dtype=torch.long, device=device).reshape(-1, 2).unbind(1)
    return row, column


@contextmanager
def _selected_positions(model: PreTrainedModel, row: Int[Tensor, " N"], column: Int[Tensor, " N"]) -> Iterator[None]:
    """The output layer sees only the chosen positions, as one row of N.

    The model's own forward pass does the rest, so that what it does to logits (softcap, scale) stays its own.
    """

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][row, column][None], *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """The model in evaluation mode, its parameters without gradient; as it was afterwards."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
