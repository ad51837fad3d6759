"""Losses of many prompts on their own rows, in shared forward passes."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from overture.spec import execution_device
from overture.tuning.config import TuneConfig
from overture.tuning.example import Example
from overture.tuning.forward import Trained
from overture.tuning.tasks import Task

__all__ = ["by_owner", "mean_losses", "precision"]

_EVALUATION_ROWS = 64


def precision(model: PreTrainedModel, config: TuneConfig) -> AbstractContextManager[object]:
    """Autocast to bfloat16 if the options and the device say so."""
    device = execution_device(model).type
    able = device == "cuda" and torch.cuda.is_bf16_supported()
    if config.precision == "bf16" or (config.precision == "auto" and able):
        return torch.autocast(device, torch.bfloat16)
    return contextlib.nullcontext()


@torch.no_grad()
def mean_losses(
    model: PreTrainedModel,
    task: Task,
    pairs: Sequence[tuple[Trained, Sequence[Example]]],
    config: TuneConfig,
    filler: int,
) -> list[float]:
    """Mean loss per target (nats) of each prompt on its own rows, all in shared batches.

    Args:
        model: the frozen model.
        task: what it is trained to answer.
        pairs: what rows are run under, and the rows.
        config: for the precision.
        filler: token id for padding.
    """
    work = [
        (owner, trained, example.without_places() if trained.value is None else example)
        for owner, (trained, examples) in enumerate(pairs)
        for example in examples
    ]
    work.sort(key=lambda item: len(item[2].ids))
    totals = torch.zeros(len(pairs), dtype=torch.float64)
    for start in range(0, len(work), _EVALUATION_ROWS):
        owners, rows, examples = zip(*work[start : start + _EVALUATION_ROWS], strict=True)
        with precision(model, config):
            sums = task.losses(model, rows, examples, filler)
        totals += by_owner(sums, owners, len(pairs)).double().cpu()
    counts = [sum(example.num_targets for example in examples) for _, examples in pairs]
    return [total / count for total, count in zip(totals.tolist(), counts, strict=True)]


def by_owner(sums: Tensor, owners: Sequence[int], count: int) -> Tensor:
    """Sums of rows as sums of their owners, who are numbered from 0."""
    return sums.new_zeros(count).index_add(0, torch.tensor(owners, device=sums.device), sums)
