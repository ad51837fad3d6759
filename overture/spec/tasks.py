"""What a model's class is for: the one place that knows it, from transformers' own lists."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.models.auto import modeling_auto

from overture.spec.modules import unwrapped

__all__ = ["TASKS", "named_task", "task_of"]

TASKS: dict[str, Any] = {
    # BART's class stands among the masked language models, too, but what it is trained for is this.
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "causal-lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked-lm": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "sequence-classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "token-classification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "question-answering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}
"""The tasks, and the classes that transformers lists for each."""


def task_of(model: nn.Module) -> str | None:
    """What a model is for: one of `TASKS`, or None if it is none of them."""
    inner = unwrapped(model)
    for cls in type(inner).__mro__:
        task = named_task(cls.__name__)
        if task is not None:
            return task
    # A class that transformers does not list writes text, if it can.
    if inner.get_output_embeddings() is None or not inner.can_generate():
        return None
    return "seq2seq" if inner.config.is_encoder_decoder else "causal-lm"


def named_task(name: str) -> str | None:
    """What the class of a name is for."""
    for task, mapping in TASKS.items():
        if any(name == names or (not isinstance(names, str) and name in names) for names in mapping.values()):
            return task
    return None
