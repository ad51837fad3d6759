"""The task of a student: say of every answer token what the teacher says.

Shape suffixes: N answer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from overture.tuning.distill.lessons import Lesson, TaughtExample
from overture.tuning.example import Example
from overture.tuning.forward import Trained, selected_logits
from overture.tuning.tasks.causal import CausalLM

__all__ = ["Distillation"]


class Distillation(CausalLM):
    """A decoder behind a prompt that answers as the same decoder does behind a text."""

    name = "distillation"

    def target_losses(
        self,
        model: PreTrainedModel,
        rows: Sequence[Trained],
        examples: Sequence[Example],
        filler: int,
        places: Sequence[tuple[int, int]],
    ) -> Float[Tensor, " N"]:
        """How far the student is from the teacher at every answer token, in nats."""
        lesson = Lesson.joined([example.lesson for example in examples if isinstance(example, TaughtExample)])
        return lesson.divergence(selected_logits(model, rows, examples, filler, places))
