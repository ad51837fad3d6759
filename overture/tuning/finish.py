"""From a prompt that has done training to its result."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from overture.errors import DivergedError, PromptFileError
from overture.prompt import SoftPrompt
from overture.runtime.fold import fold
from overture.spec import ModelSpec
from overture.tuning.results import TuneResult
from overture.tuning.tasks import Task
from overture.tuning.trainee import Trainee

__all__ = ["result_of"]


def result_of(model: PreTrainedModel, task: Task, trainee: Trainee, loss: float) -> TuneResult:
    """The tuned prompt and how it went.

    Args:
        model: the frozen model.
        task: what it is for.
        trainee: the prompt, as it shall be stored.
        loss: its loss as it stands.

    Raises:
        DivergedError: the prompt has numbers that are not finite.
    """
    spec, method = ModelSpec.of(model), trainee.method
    with torch.no_grad():
        value, head = fold(model, trainee.module()), trainee.answers()
        head = head and head.map(lambda t: t.detach().float().cpu().contiguous())
    metrics = {
        "frozen_loss": trainee.frozen_loss,
        "loss": loss,
        "steps": trainee.step,
        "best_step": trainee.best_step or trainee.step,
        "train_rows": len(trainee.train),
        "dev_rows": len(trainee.dev),
    }
    prompt = SoftPrompt(value, spec.base, method.template_, method.describe(), metrics, trainee.name, head)
    try:
        prompt.check_finite()
    except PromptFileError as error:
        raise DivergedError(
            expected="finite numbers in the tuned prompt", got=error.got, do="lower the learning rate"
        ) from error
    return TuneResult(
        name=trainee.name,
        prompt=prompt,
        method=method.name,
        trained_parameters=sum(p.numel() for p in trainee.parameters().values()),
        stored_parameters=prompt.num_parameters,
        base_parameters=spec.num_parameters,
        unit=task.unit,
        frozen_loss=trainee.frozen_loss,
        loss=loss,
        train_curve=tuple(trainee.train_curve),
        dev_curve=tuple(trainee.dev_curve),
        seconds=trainee.seconds,
        stop_reason=trainee.finished or "steps",
    )
