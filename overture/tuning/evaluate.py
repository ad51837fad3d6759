"""How well a prompt, or the frozen model, answers rows of data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Generator, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from overture.errors import ConfigError
from overture.prompt import SoftPrompt
from overture.runtime.heads import answers_with, own_labels
from overture.runtime.tokens import filler_id
from overture.spec import ModelSpec, unwrapped
from overture.template import Template
from overture.tuning.config import TuneConfig
from overture.tuning.data import Row, Source, load_rows
from overture.tuning.examples import encode_for
from overture.tuning.forward import Trained, frozen
from overture.tuning.losses import mean_losses
from overture.tuning.tasks import Form, PredictingTask, Task, task_for

__all__ = ["EvalResult", "evaluate"]


@dataclass(frozen=True, slots=True)
class EvalResult:
    """One prompt measured on rows of data."""

    loss: float
    """Mean loss per target, nats."""
    targets: int
    """What the mean is over: target tokens where text is learned, else rows or words."""
    rows: int
    """Rows."""
    metrics: Mapping[str, float]
    """How right the answers are, 0 to 1: exact match, accuracy, F1, as fits the task; empty if not asked for."""

    @property
    def exact_match(self) -> float | None:
        """Share of rows whose answer is exactly the one wanted, 0 to 1; None if it was not measured."""
        return self.metrics.get("exact_match")

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(min(self.loss, 700.0))


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: SoftPrompt | None,
    data: Source,
    *,
    template: str | Template | None = None,
    verbalizer: Mapping[str, str | Sequence[str]] | None = None,
    exact_match: bool = False,
    batch_size: int = 64,
    truncate: bool = False,
) -> EvalResult:
    """Measure a prompt on rows of data.

    Args:
        model: the base model.
        tokenizer: its tokenizer.
        prompt: the prompt; None for the frozen model.
        data: rows as `tune` takes them.
        template: for the frozen model: a template whose columns the rows have. The model reads its text without the
            virtual tokens. None for rows as `tune` takes them without a template; a prompt brings its own.
        verbalizer: for the frozen model: the words of each label at the mask. A prompt brings its own.
        exact_match: where text is written, also generate greedily and compare with the completions. Other tasks are
            always measured by their answers.
        batch_size: rows answered at once, 1 or more.
        truncate: cut the left side of rows that are too long, instead of refusing them.

    Raises:
        DataError: the data cannot be used.
        BaseMismatchError: the prompt belongs to another base model.
        ConfigError: a template or words for a prompt, which brings its own; a template without virtual tokens; or a
            frozen model whose own head has other labels than the data.
        UnsupportedModelError: the model is for no task that Overture knows.
    """
    rows = load_rows(data, kind="evaluation")
    if batch_size < 1:
        raise ConfigError(expected="batch_size of 1 or more", got=str(batch_size), do="use the default, 64")
    if prompt is not None and (template is not None or verbalizer is not None):
        raise ConfigError(
            expected="a template or words for the frozen model only",
            got=f"some for the prompt {prompt.name!r}",
            do="leave them out; a prompt brings its own",
        )
    model = unwrapped(model)
    spec, task = ModelSpec.of(model), task_for(model)
    if prompt is not None:
        prompt.check_base(spec.base)
        template = prompt.template
    parsed = Template.parse(template) if isinstance(template, str) else template
    form = Form(tokenizer=tokenizer, template=parsed, head=None if prompt is None else prompt.head)
    with frozen(model):
        if form.head is None:
            form = _own(task, model, form, rows, verbalizer)
        trained = Trained(prompt, form.head)
        examples = encode_for(task, spec, prompt, form, rows, truncate=truncate)
        loss = mean_losses(model, task, [(trained, examples)], TuneConfig(), filler_id(tokenizer))[0]
        asked = exact_match or isinstance(task, PredictingTask)
        metrics = task.measure(model, trained, examples, form, batch_size) if asked else {}
    return EvalResult(loss, sum(e.num_targets for e in examples), len(rows), metrics)


def _own(
    task: Task,
    model: PreTrainedModel,
    form: Form,
    rows: Sequence[Row],
    verbalizer: Mapping[str, str | Sequence[str]] | None,
) -> Form:
    """The form with the model's own head, if the task has one."""
    head = task.head(model, form, rows, verbalizer, Generator())
    if head is not None and head.words is None and not answers_with(model, head.labels):
        raise ConfigError(
            expected=f"rows with the labels of the model's own head: {', '.join(own_labels(model))}",
            got=f"the labels {', '.join(head.labels)}",
            do="evaluate a prompt, which brings a head of its own, or correct the labels",
        )
    return replace(form, head=head)
