"""A prompt in training as a model, for the training loops of others: transformers, TRL, Accelerate, or a plain one."""

from overture.trainer.model import PromptModel

__all__ = ["PromptModel"]
