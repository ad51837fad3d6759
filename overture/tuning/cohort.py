"""The loop: prompts in training share every forward and backward pass, and nothing else."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from overture.errors import DivergedError, OvertureError
from overture.runtime.recompute import checkpointed_blocks, checkpointing
from overture.spec import execution_device
from overture.tuning.checkpoint import load_checkpoint, save_checkpoint
from overture.tuning.config import TuneConfig
from overture.tuning.events import CheckpointSaved, Evaluated, Failed, Finished, Listener, StepDone
from overture.tuning.example import Example
from overture.tuning.forward import Trained, frozen
from overture.tuning.tasks import Task
from overture.tuning.trainee import Trainee

__all__ = ["Cohort", "mean_losses"]

_EVALUATION_ROWS = 64


class Cohort:
    """Prompts trained together on one frozen model, each as if it were alone.

    Every row of a batch stands under its own prompt; the losses of different prompts are added, so that each prompt
    gets the gradient of its own mean loss.

    Args:
        model: the frozen model.
        task: what it is trained to answer.
        trainees: the prompts in training.
        config: the run's options.
        filler: token id for padding.
        listener: told of every event.
        checkpoint: file to save to and resume from; None for none.
        identity: digest of everything that defines the run; a checkpoint of another run is refused.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        task: Task,
        trainees: Sequence[Trainee],
        config: TuneConfig,
        *,
        filler: int,
        listener: Listener,
        checkpoint: Path | None,
        identity: str,
    ) -> None:
        self.model, self.task, self.trainees, self.config, self.filler = model, task, list(trainees), config, filler
        self.tell, self.checkpoint, self.identity = listener, checkpoint, identity
        self.failures: dict[str, OvertureError] = {}
        self.seconds = 0.0

    @property
    def active(self) -> list[Trainee]:
        """Prompts still in training."""
        return [t for t in self.trainees if t.finished is None and t.name not in self.failures]

    def resume(self) -> bool:
        """Take up the checkpoint, if there is one."""
        if self.checkpoint is None or not self.checkpoint.exists():
            return False
        self.failures = load_checkpoint(self.checkpoint, self.identity, self.trainees)
        return True

    def run(self) -> None:
        """Train until every prompt has finished or failed."""
        began = time.perf_counter()
        evaluate_every = self.config.eval_every or max(self.config.steps // 10, 1)
        save_every = self.config.checkpoint_every or max(self.config.steps // 10, 1)
        with frozen(self.model):
            self._measure_start()
            while active := self.active:
                step = active[0].step + 1
                losses, tokens = self._step(active)
                elapsed = time.perf_counter() - began
                self.tell(StepDone(step, self.config.steps, losses, tokens, elapsed))
                if step % evaluate_every == 0 or step == self.config.steps:
                    self._evaluate([t for t in active if t.name not in self.failures])
                for trainee in active:
                    if trainee.finished:
                        self.tell(Finished(trainee.name, trainee.finished, trainee.step))
                if step % save_every == 0 or not self.active:
                    self._save(step)
        self.seconds = time.perf_counter() - began

    def _measure_start(self) -> None:
        fresh = [t for t in self.active if t.step == 0]
        losses = self._measured([(t.untuned(), t.dev or t.train) for t in fresh])
        for trainee, loss in zip(fresh, losses, strict=True):
            trainee.frozen_loss = loss

    def _step(self, active: Sequence[Trainee]) -> tuple[dict[str, float], int]:
        batches = [trainee.batches() for trainee in active]
        targets = [sum(e.num_targets for batch in passes for e in batch) for passes in batches]
        totals = torch.zeros(len(active))
        for part in range(self.config.gradient_accumulation):
            rows: list[Trained] = []
            owners: list[int] = []
            examples: list[Example] = []
            for owner, (trainee, passes) in enumerate(zip(active, batches, strict=True)):
                rows += [trainee.noisy()] * len(passes[part])
                owners += [owner] * len(passes[part])
                examples += passes[part]
            with (
                precision(self.model, self.config),
                checkpointed_blocks(self.model, checkpointing() if self.config.gradient_checkpointing else None),
            ):
                sums = self.task.losses(self.model, rows, examples, self.filler)
            means = _by_owner(sums, owners, len(active)) / torch.tensor(targets, device=sums.device)
            means.sum().backward()
            totals += means.detach().cpu()
        for trainee, loss in zip(active, totals.tolist(), strict=True):
            self._guarded(trainee, loss)
        tokens = sum(len(e.ids) for passes in batches for batch in passes for e in batch)
        return {t.name: loss for t, loss in zip(active, totals.tolist(), strict=True)}, tokens

    def _guarded(self, trainee: Trainee, loss: float) -> None:
        try:
            trainee.update(loss)
        except DivergedError as error:
            self.failures[trainee.name] = error
            self.tell(Failed(trainee.name, error))

    @torch.no_grad()
    def _evaluate(self, trainees: Sequence[Trainee]) -> None:
        measured = [t for t in trainees if t.dev]
        losses = self._measured([(t.plain(), t.dev) for t in measured])
        for trainee, loss in zip(measured, losses, strict=True):
            best = trainee.judge(loss)
            self.tell(Evaluated(trainee.name, trainee.step, loss, best))

    def _measured(self, pairs: Sequence[tuple[Trained, Sequence[Example]]]) -> list[float]:
        return mean_losses(self.model, self.task, pairs, self.config, self.filler)

    def _save(self, step: int) -> None:
        if self.checkpoint is not None:
            save_checkpoint(self.checkpoint, self.identity, self.trainees, self.failures)
            self.tell(CheckpointSaved(step, self.checkpoint))


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
        totals += _by_owner(sums, owners, len(pairs)).double().cpu()
    counts = [sum(example.num_targets for example in examples) for _, examples in pairs]
    return [total / count for total, count in zip(totals.tolist(), counts, strict=True)]


def _by_owner(sums: Tensor, owners: Sequence[int], count: int) -> Tensor:
    return sums.new_zeros(count).index_add(0, torch.tensor(owners, device=sums.device), sums)
