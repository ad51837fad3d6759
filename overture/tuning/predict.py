"""`predict`: what a model answers under its prompts where the answer is a label, tags, or a span."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from overture.errors import ConfigError, UnsupportedModelError
from overture.prompt import SoftPrompt
from overture.runtime.fill import Item
from overture.spec import ModelSpec, unwrapped
from overture.tuning.data import Row
from overture.tuning.examples import encode_for
from overture.tuning.forward import Trained, frozen
from overture.tuning.predictions import Prediction
from overture.tuning.tasks import Form, PredictingTask, task_for

__all__ = ["predict"]


def predict(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Sequence[Item],
    prompts: SoftPrompt | Sequence[SoftPrompt | None] | None = None,
    *,
    truncate: bool = False,
) -> list[Prediction]:
    """Answer every input under its own prompt and head, all in one batch.

    Args:
        model: a model for sequence or token classification, question answering, or masked language modelling.
        tokenizer: its tokenizer.
        inputs: texts, or rows as `tune` takes them; they need no answers.
        prompts: one per input, or one for all; None is the frozen model with its own head.
        truncate: cut the right side of texts that are too long, instead of refusing them.

    Returns:
        Per input a `Label`, `Tags`, or an `Answer`.

    Raises:
        ConfigError: not one prompt per input.
        DataError: an input cannot be used.
        UnsupportedModelError: the model is for another task.
        BaseMismatchError: a prompt belongs to another base model, or its head to another task.
    """
    model = unwrapped(model)
    task = task_for(model)
    if not isinstance(task, PredictingTask):
        raise UnsupportedModelError(
            expected="a model that classifies, answers with a span, or fills a mask",
            got=f"{type(model).__name__}, which writes text",
            do="use overture.generate",
        )
    rows = list(prompts) if isinstance(prompts, Sequence) else [prompts] * len(inputs)
    if len(rows) != len(inputs):
        raise ConfigError(
            expected=f"one prompt per input ({len(inputs)}), or a single prompt",
            got=f"{len(rows)} prompts",
            do="repeat prompts or inputs so that they pair up",
        )
    spec, examples, trained = ModelSpec.of(model), [], []
    for number, (item, prompt) in enumerate(zip(inputs, rows, strict=True), 1):
        template, head = (None, None) if prompt is None else (prompt.template, prompt.head)
        form = Form(tokenizer=tokenizer, template=template, head=head, answered=False)
        row = Row(task.row_of(item, form), f"input {number}")
        examples += encode_for(task, spec, prompt, form, [row], truncate=truncate)
        trained.append(Trained(prompt, head))
    if not examples:
        return []
    with torch.no_grad(), frozen(model):
        return task.predict(model, trained, examples, Form(tokenizer=tokenizer, answered=False))
