"""What a run's results depend on, as digests, so that nobody resumes another run by mistake."""

from __future__ import annotations

import hashlib
import json

from overture.prompt import BaseModelId, SoftPrompt
from overture.tuning.config import TuneConfig
from overture.tuning.tasks import Task
from overture.tuning.trainee import Trainee

__all__ = ["run_identity", "trainee_identity"]


def run_identity(base: BaseModelId, task: Task, config: TuneConfig, behind: SoftPrompt | None) -> str:
    """Digest of what all prompts of a run have in common."""
    shared = [base.architecture, base.digest, task.name, config.as_dict()]
    digest = hashlib.sha256(json.dumps(shared, sort_keys=True).encode())
    for tensor in behind.value.tensors().values() if behind else ():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def trainee_identity(trainee: Trainee) -> str:
    """Digest of what is one prompt's own: its method, its labels and where their layers start, its rows."""
    head = trainee.form.head
    labels = head and [head.task, head.labels, head.words]
    digest = hashlib.sha256(json.dumps([trainee.name, trainee.method.describe(), labels], sort_keys=True).encode())
    for tensor in head.tensors.values() if head else ():
        digest.update(tensor.cpu().numpy().tobytes())
    for split in (trainee.train, trainee.dev):
        digest.update(f"{len(split)} rows".encode())
        for example in split:
            digest.update(repr(example).encode())
    return digest.hexdigest()
