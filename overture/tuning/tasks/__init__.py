"""What models are trained to answer: one small file per task."""

from __future__ import annotations

from transformers import PreTrainedModel

from overture.errors import ConfigError, UnsupportedModelError
from overture.spec import task_of
from overture.tuning.tasks.base import Builder, Form, PredictingTask, Task
from overture.tuning.tasks.causal import CausalLM
from overture.tuning.tasks.cloze import MaskedLM
from overture.tuning.tasks.questions import QuestionAnswering
from overture.tuning.tasks.seq2seq import Seq2Seq
from overture.tuning.tasks.sequence import SequenceClassification
from overture.tuning.tasks.tokens import TokenClassification

__all__ = ["TASKS", "Builder", "Form", "PredictingTask", "Task", "task_for"]

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        CausalLM(),
        Seq2Seq(),
        MaskedLM(),
        SequenceClassification(),
        TokenClassification(),
        QuestionAnswering(),
    )
}
"""The tasks by their names."""


def task_for(model: PreTrainedModel, asked: str | None = None) -> Task:
    """The task of a model.

    Args:
        model: the frozen model.
        asked: the task that the caller expects; None for whatever the model is for.

    Raises:
        UnsupportedModelError: the model is for none of them, or of the right class and still cannot do it.
        ConfigError: the model is for another task than `asked`.
    """
    name = task_of(model)
    if name not in TASKS:
        raise UnsupportedModelError(
            expected=f"a model for {', '.join(TASKS)}",
            got=f"{type(model).__name__}, which is for {name or 'none of these'}",
            do="load the model with the Auto class of its task, such as AutoModelForCausalLM.from_pretrained(...)",
        )
    if asked not in (None, name):
        raise ConfigError(
            expected=f"a model for {asked}",
            got=f"{type(model).__name__}, which is for {name}",
            do="load the model with the Auto class of that task, or leave the task out",
        )
    TASKS[name].check(model)
    return TASKS[name]
