"""A head in training: a copy of the model's layers behind the backbone, with an output for every label."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Generator, Tensor, nn
from transformers import PreTrainedModel

from overture.prompt import Head
from overture.runtime.heads import answers_with, head_modules
from overture.spec import execution_device

__all__ = ["HeadModule", "start_head"]

_SPREAD = 0.02


def start_head(model: PreTrainedModel, task: str, labels: tuple[str, ...], generator: Generator) -> Head:
    """Where a head starts: as the model's own. Outputs for other labels than the model's start at random.

    Args:
        model: the frozen model.
        task: what the head is for.
        labels: names of its outputs.
        generator: source of all randomness.
    """
    modules = head_modules(model)
    output = next(reversed(modules))
    kept = answers_with(model, labels)
    tensors: dict[str, Tensor] = {}
    for path, module in modules.items():
        for name, parameter in module.named_parameters(recurse=False):
            start = parameter.detach().float().clone()
            if path == output and not (kept and len(labels) == len(start)):
                spread = getattr(model.config, "initializer_range", _SPREAD) if start.ndim == 2 else 0.0
                start = torch.randn(len(labels), *start.shape[1:], generator=generator) * spread
            tensors[f"{path}.{name}"] = start.to(execution_device(model))
    return Head(task, labels, tensors)


class HeadModule(nn.Module):
    """The layers of a head as parameters."""

    def __init__(self, start: Head) -> None:
        super().__init__()
        self.start = start
        # By number: the paths have dots, which names of parameters may not have.
        self.tensors = nn.ParameterList([nn.Parameter(tensor.clone()) for tensor in start.tensors.values()])

    def forward(self) -> Head:
        """The head as it stands now, with gradient."""
        tensors: Mapping[str, Tensor] = dict(zip(self.start.tensors, self.tensors, strict=True))
        return Head(self.start.task, self.start.labels, tensors, self.start.words)
