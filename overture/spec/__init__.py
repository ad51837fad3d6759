"""What a frozen model looks like from outside, found by running it once and not by guessing from its config."""

from overture.spec.model_spec import ModelSpec
from overture.spec.modules import (
    attention_modules,
    backbone,
    block_modules,
    evaluating,
    execution_device,
    handing_on,
    measuring,
    stacks,
    surrounding,
    token_embedding,
    unwrapped,
)
from overture.spec.output import gives_plain_logits
from overture.spec.probe import AttentionLayer
from overture.spec.settled import settled
from overture.spec.tasks import TASKS, named_task, task_of

__all__ = [
    "TASKS",
    "AttentionLayer",
    "ModelSpec",
    "attention_modules",
    "backbone",
    "block_modules",
    "evaluating",
    "execution_device",
    "gives_plain_logits",
    "handing_on",
    "measuring",
    "named_task",
    "settled",
    "stacks",
    "surrounding",
    "task_of",
    "token_embedding",
    "unwrapped",
]
