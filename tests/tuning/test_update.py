"""One optimizer step of many prompts. Oracles: torch's own clipping and AdamW on one prompt, and each prompt alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from overture.methods import PromptModule, PromptTuning
from overture.prompt import VirtualTokens
from overture.tuning.config import TuneConfig
from overture.tuning.example import TextExample
from overture.tuning.tasks import Form
from overture.tuning.trainee import Trainee
from overture.tuning.update import update

ROW = TextExample(ids=(3, 4), targets=(False, True))


class _Module(PromptModule):
    """Parameters of given shapes, in double precision."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], seed: int) -> None:
        super().__init__()
        noise = Generator().manual_seed(seed)
        numbers = (torch.randn(*shape, generator=noise, dtype=torch.float64) for shape in shapes)
        self.parts = nn.ParameterList([nn.Parameter(number) for number in numbers])

    def forward(self, generator: Generator | None = None) -> VirtualTokens:
        return VirtualTokens(self.parts[0])


def trainee(name: str, shapes: Sequence[tuple[int, ...]], seed: int, tokenizer: Any, **options: Any) -> Trainee:
    config = TuneConfig(**({"steps": 20, "learning_rate": 0.1, "weight_decay": 0.01} | options))
    form = Form(tokenizer=tokenizer)
    return Trainee(name, PromptTuning(), _Module(shapes, seed), form, [ROW], [], config)


def gradients(one: Trainee, step: int, size: float) -> list[Tensor]:
    noise = Generator().manual_seed(100 + step)
    return [size * torch.randn(p.shape, generator=noise, dtype=p.dtype) for p in one.parameters().values()]


def steps(trainees: Sequence[Trainee], first: int, count: int) -> None:
    for step in range(first, first + count):
        for number, one in enumerate(trainees):
            for parameter, gradient in zip(
                one.parameters().values(), gradients(one, step, [0.01, 1.0, 30.0][number % 3]), strict=True
            ):
                parameter.grad = gradient
        update(trainees)
        for one in trainees:
            one.count(0.0)


@pytest.fixture
def cohort(tokenizer) -> list[Trainee]:
    """Prompts of different sizes, one of them some steps ahead, with options of their own."""
    made = [
        trainee("small", [(2, 3)], 0, tokenizer),
        trainee("large", [(4, 3), (40, 5), (7,)], 1, tokenizer),
        trainee("other rate", [(2, 3)], 2, tokenizer, learning_rate=0.03, schedule="constant"),
        trainee("without clipping", [(2, 3)], 3, tokenizer, clip=None),
        trainee("adafactor", [(2, 3), (5,)], 4, tokenizer, optimizer="adafactor"),
    ]
    steps(made[1:2], 50, 3)
    return made


def numbers(one: Trainee) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in one.state()[0].items()}


def test_a_prompt_gets_the_bytes_it_gets_alone(cohort) -> None:
    """Invariant 5 for clipping, rates and the optimizer's state: parameters and state byte for byte."""
    alone = [copy.deepcopy(one) for one in cohort]
    steps(cohort, 0, 4)
    for number, one in enumerate(alone):
        # Alone, but with the gradients that it had in the cohort.
        for step in range(4):
            size = [0.01, 1.0, 30.0][number % 3]
            for parameter, gradient in zip(one.parameters().values(), gradients(one, step, size), strict=True):
                parameter.grad = gradient
            update([one])
            one.count(0.0)
    for one, other in zip(cohort, alone, strict=True):
        assert numbers(one) == numbers(other), one.name
        assert one.step == other.step


def test_a_step_is_torchs(cohort) -> None:
    """Oracle: `clip_grad_norm_` and `AdamW` of torch, in double precision, so 1e-12 is rounding."""
    one = cohort[1]
    mine = list(one.parameters().values())
    theirs = [nn.Parameter(p.detach().clone()) for p in mine]
    optimizer = torch.optim.AdamW(theirs, weight_decay=0.01, betas=(0.5, 0.99))
    for old, new in zip(mine, theirs, strict=True):
        kept = one.optimizer.state[old]
        optimizer.state[new] = {key: value.clone() for key, value in kept.items()}
        assert kept["step"] == 3
    for step, size in ((7, 0.01), (8, 50.0)):  # below the limit, and far above it
        for parameter, gradient in zip(mine, gradients(one, step, size), strict=True):
            parameter.grad = gradient
        for parameter, gradient in zip(theirs, gradients(one, step, size), strict=True):
            parameter.grad = gradient
        update([one])
        optimizer.param_groups[0]["lr"] = one.optimizer.param_groups[0]["lr"]
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        optimizer.step()
        assert all(p.grad is None for p in mine)
        for old, new in zip(mine, theirs, strict=True):
            assert torch.allclose(old, new, rtol=1e-12, atol=1e-12)
