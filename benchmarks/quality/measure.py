"""How well what was trained answers the test rows, by one code for all sides."""

from __future__ import annotations

from typing import Any

import torch
from sacrebleu import corpus_bleu

import overture as ov
from benchmarks.quality.backbones import MAX_LENGTH, rows_for
from benchmarks.quality.fit import Fit
from benchmarks.quality.tasks import Task
from overture.runtime.tokens import filler_id
from overture.tuning.data import load_rows
from overture.tuning.examples import encode_for
from overture.tuning.forward import Trained
from overture.tuning.tasks import Form, task_for

__all__ = ["measured"]

_NEW_TOKENS = 80


def measured(backbone: str, task: Task, fit: Fit) -> dict[str, Any]:
    """Per test row, in the order of the task: a text's loss in nats and its targets, or a choice's label.

    With references to a text, also BLEU.
    """
    if task.labels:
        return {"answers": _choices(backbone, task, fit)}
    losses, targets = _losses(backbone, task, fit)
    found: dict[str, Any] = {"losses": [round(loss, 3) for loss in losses], "targets": targets}
    if task.references:
        found["bleu"] = round(_bleu(task, fit), 2)
    return found


def _losses(backbone: str, task: Task, fit: Fit, label: str | None = None) -> tuple[list[float], list[int]]:
    """Loss of each row's targets, summed, and their number."""
    own, spec = task_for(fit.model), ov.ModelSpec.of(fit.model)
    rows = load_rows(rows_for(backbone, task, task.test, label), kind="test")
    form, longest = Form(tokenizer=fit.tokenizer), MAX_LENGTH[backbone]
    examples = encode_for(own, spec, None, form, rows, max_length=longest, truncate=True)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]))
    losses = [0.0] * len(examples)
    for start in range(0, len(order), 32):
        some = order[start : start + 32]
        trained = [Trained(fit.prompt, None)] * len(some)
        with torch.no_grad():
            sums = own.losses(fit.model, trained, [examples[i] for i in some], filler_id(fit.tokenizer))
        for i, loss in zip(some, sums.tolist(), strict=True):
            losses[i] = loss
    return losses, [e.num_targets for e in examples]


def _choices(backbone: str, task: Task, fit: Fit) -> list[str]:
    """The likeliest label of each row."""
    if backbone == "minilm":
        rows = [row["text"] for row in task.test]
        found = []
        for start in range(0, len(rows), 32):
            some = rows[start : start + 32]
            found += ov.predict(fit.model, fit.tokenizer, some, fit.prompt, truncate=True)
        return [prediction.label for prediction in found]
    by_label = [_losses(backbone, task, fit, label)[0] for label in task.labels]
    return [task.labels[min(range(len(row)), key=row.__getitem__)] for row in zip(*by_label, strict=True)]


def _bleu(task: Task, fit: Fit) -> float:
    """Of what is written greedily, over all references."""
    asked = [row["prompt"] for row in task.test]
    written = ov.generate(fit.model, fit.tokenizer, fit.prompt, asked, max_new_tokens=_NEW_TOKENS, do_sample=False)
    most = max(map(len, task.references))
    streams = [[row[i] if i < len(row) else None for row in task.references] for i in range(most)]
    return corpus_bleu([text.strip() for text in written], streams).score
