"""What a frozen model looks like from outside, found by running it once and not by guessing from its config."""

from overture.spec.model_spec import ModelSpec
from overture.spec.modules import (
    attention_modules,
    backbone,
    block_modules,
    evaluating,
    execution_device,
    stacks,
    token_embedding,
    unwrapped,
)
from overture.spec.probe import AttentionLayer

__all__ = [
    "AttentionLayer",
    "ModelSpec",
    "attention_modules",
    "backbone",
    "block_modules",
    "evaluating",
    "execution_device",
    "stacks",
    "token_embedding",
    "unwrapped",
]
