"""Losses of many prompts, each on its own rows, in passes that they share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from overture.runtime.recompute import checkpointed_blocks, checkpointing
from overture.spec import execution_device
from overture.tuning.config import TuneConfig
from overture.tuning.example import Example
from overture.tuning.forward import Trained
from overture.tuning.passes import Fits, Size
from overture.tuning.tasks import Task

__all__ = ["Share", "backward", "mean_losses"]

_EVALUATION_ROWS = 64


class Share(NamedTuple):
    """One prompt's part in a pass."""

    trained: Trained
    """What its rows are run under, with gradient."""
    examples: Sequence[Example]
    """Its rows."""
    targets: int
    """What its loss is a mean over: targets of all its rows in the step, also those of other passes."""


def backward(
    model: PreTrainedModel, task: Task, config: TuneConfig, shares: Sequence[Share], filler: int
) -> list[float]:
    """One forward and backward pass; every prompt gets the gradient of its own mean loss, and of nothing else.

    Returns:
        What the pass adds to the mean loss (nats) of each prompt.
    """
    rows = [share.trained for share in shares for _ in share.examples]
    owners = [owner for owner, share in enumerate(shares) for _ in share.examples]
    examples = [example for share in shares for example in share.examples]
    with (
        precision(model, config),
        checkpointed_blocks(model, checkpointing() if config.gradient_checkpointing else None),
    ):
        sums = task.losses(model, rows, examples, filler)
    targets = torch.tensor([share.targets for share in shares], device=sums.device)
    means = by_owner(sums, owners, len(shares)) / targets
    means.sum().backward()
    losses: list[float] = means.tolist()
    return losses


@torch.no_grad()
def mean_losses(
    model: PreTrainedModel,
    task: Task,
    pairs: Sequence[tuple[Trained, Sequence[Example]]],
    config: TuneConfig,
    filler: int,
    fits: Fits | None = None,
) -> list[float]:
    """Mean loss per target (nats) of each prompt on its own rows, all in shared batches.

    Args:
        model: the frozen model.
        task: what it is trained to answer.
        pairs: what rows are run under, and the rows.
        config: for the precision.
        filler: token id for padding.
        fits: whether there is memory for a batch; None for any of at most 64 rows.
    """
    work = [
        _Row(owner, trained, example.without_places() if trained.value is None else example)
        for owner, (trained, examples) in enumerate(pairs)
        for example in examples
    ]
    work.sort(key=lambda row: len(row.example))
    totals = torch.zeros(len(pairs), dtype=torch.float64)
    for batch in _batches(work, fits):
        owners, rows, examples = zip(*batch, strict=True)
        with precision(model, config):
            sums = task.losses(model, rows, examples, filler)
        totals += by_owner(sums, owners, len(pairs)).double().cpu()
    counts = [sum(example.num_targets for example in examples) for _, examples in pairs]
    return [total / count for total, count in zip(totals.tolist(), counts, strict=True)]


class _Row(NamedTuple):
    """A row to be measured."""

    owner: int
    """Number of its prompt."""
    trained: Trained
    example: Example


def _batches(work: Sequence[_Row], fits: Fits | None) -> Iterator[list[_Row]]:
    """Runs of rows measured together. The rows get longer, so the last of a batch is its longest."""
    batch: list[_Row] = []
    owners: set[int] = set()
    for row in work:
        size = Size(len(owners | {row.owner}), len(batch) + 1, len(row.example))
        if batch and (len(batch) == _EVALUATION_ROWS or not (fits is None or fits(size))):
            yield batch
            batch, owners = [], set()
        batch.append(row)
        owners.add(row.owner)
    if batch:
        yield batch


def precision(model: PreTrainedModel, config: TuneConfig) -> AbstractContextManager[object]:
    """Autocast to bfloat16 if the options and the device say so."""
    device = execution_device(model).type
    able = device == "cuda" and torch.cuda.is_bf16_supported()
    if config.precision == "bf16" or (config.precision == "auto" and able):
        return torch.autocast(device, torch.bfloat16)
    return contextlib.nullcontext()


def by_owner(sums: Tensor, owners: Sequence[int], count: int) -> Tensor:
    """Sums of rows as sums of their owners, who are numbered from 0."""
    return sums.new_zeros(count).index_add(0, torch.tensor(owners, device=sums.device), sums)
