"""One optimizer step of many prompts: every prompt's numbers are its own, and all of them meet in few operations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor
from torch.optim import AdamW

from overture.tuning.trainee import Trainee

__all__ = ["update"]


@torch.no_grad()
def update(trainees: Sequence[Trainee]) -> None:
    """Take one step of every prompt on the gradients at hand, each clipped by its own norm and at its own rate."""
    _clip(trainees)
    for trainee in trainees:
        trainee.set_rate()
    joined = [trainee.optimizer for trainee in trainees if isinstance(trainee.optimizer, AdamW)]
    if joined:
        _step_joined(joined)
    for trainee in trainees:
        if not isinstance(trainee.optimizer, AdamW):
            trainee.optimizer.step()
        for parameter in trainee.parameters().values():
            parameter.grad = None


def _clip(trainees: Sequence[Trainee]) -> None:
    """Scale the gradients of each prompt whose norm is above its limit down to it."""
    clipped = [t for t in trainees if t.config.clip is not None]
    owned = [[p.grad for p in t.parameters().values() if p.grad is not None] for t in clipped]
    everything = [gradient for gradients in owned for gradient in gradients]
    if not everything:
        return
    # One hand-over from the device for all. What a prompt's norm is must not depend on who else is in the tensor, so
    # it is put together here, in double precision, and not by a reduction whose order depends on its shape.
    norms = iter(torch.stack(torch._foreach_norm(everything)).tolist())
    for trainee, gradients in zip(clipped, owned, strict=True):
        assert trainee.config.clip is not None
        scale = trainee.config.clip / (math.hypot(*islice(norms, len(gradients))) + 1e-6)
        if not scale >= 1:  # a norm that is no number reaches the prompt, which is then found to have diverged
            torch._foreach_mul_(gradients, scale)


def _step_joined(optimizers: Sequence[AdamW]) -> None:
    """One step of each optimizer, by one call of the fused kernel for all parameters with equal options.

    The kernel goes through one parameter after another, so the bytes are those of separate calls.
    """
    groups: dict[object, list[Tensor]] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            options = tuple((name, value) for name, value in group.items() if name not in ("params", "peak"))
            groups.setdefault(options, []).extend(group["params"])
    joint = AdamW([dict(options) | {"params": params} for options, params in groups.items()])  # type: ignore[call-overload]
    for optimizer in optimizers:
        joint.state.update(optimizer.state)
    joint.step()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            # What the first step of a parameter makes; later ones change it in place.
            optimizer.state.update((p, joint.state[p]) for p in group["params"] if p in joint.state)
