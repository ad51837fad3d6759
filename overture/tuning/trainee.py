"""One prompt in training: its module, its optimizer, its data, and all that it needs to go on after a kill."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim import AdamW, Optimizer

from overture.errors import DivergedError
from overture.methods import Method, PromptModule, prepared
from overture.prompt import Head, SoftPrompt
from overture.runtime.head_module import HeadModule
from overture.tuning.batches import BatchOrder
from overture.tuning.config import TuneConfig
from overture.tuning.example import Example
from overture.tuning.forward import Trained
from overture.tuning.tasks import Form

__all__ = ["Trainee", "noisy"]


def noisy(trainees: Sequence[Trainee]) -> list[Trained]:
    """Each one's prompt and head with gradient, and with dropout if the method has any."""
    values = prepared([t.module for t in trainees], [t.noise for t in trainees])
    return [Trained(value, t.answers(), t.behind) for value, t in zip(values, trainees, strict=True)]


class Trainee:
    """A prompt in training. Nothing in it depends on who else trains beside it.

    Args:
        name: the prompt's name.
        method: its method.
        module: the trainable module, on the model's device.
        form: what its rows have in common; a head in it is trained beside the prompt, from where it stands.
        train: rows to learn from.
        dev: rows to stop and to choose by; may be empty.
        config: the run's options.
        behind: a fixed prompt in front of this one in every row; None for none.
    """

    def __init__(
        self,
        name: str,
        method: Method,
        module: PromptModule,
        form: Form,
        train: Sequence[Example],
        dev: Sequence[Example],
        config: TuneConfig,
        behind: SoftPrompt | None = None,
    ) -> None:
        self.name, self.method, self.module, self.form, self.config = name, method, module, form, config
        self.train, self.dev, self.behind = train, dev, behind
        self.head = HeadModule(form.head) if form.head is not None and form.head.tensors else None
        self.order = BatchOrder(train, config.batch_size, config.seed)
        self.noise = Generator().manual_seed(config.seed)
        self.peak_rate = config.learning_rate or method.learning_rate
        self.optimizer = _optimizer(module, self.head, self.peak_rate, config)
        self.step = 0
        self.best_loss = math.inf
        self.best_step = 0
        self.best: dict[str, Tensor] | None = None
        self.stale = 0
        self.train_curve: list[tuple[int, float]] = []
        self.dev_curve: list[tuple[int, float]] = []
        self.frozen_loss = math.nan
        self.finished: str | None = None
        self.seconds = 0.0

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of all its rows."""
        return sum(len(example) for example in (*self.train, *self.dev))

    @cached_property
    def longest(self) -> Example:
        """The row with the most tokens."""
        return max(self.train, key=len)

    def batches(self) -> list[list[Example]]:
        """The rows of the next step, one list per forward pass."""
        passes = self.config.gradient_accumulation
        return [self.order.batch(self.step * passes + i) for i in range(passes)]

    def plain(self) -> Trained:
        """Prompt and head as they stand, without dropout."""
        return Trained(self.module(), self.answers(), self.behind)

    def untuned(self) -> Trained:
        """What there is without this prompt, with the head as it started."""
        return Trained(None, self.form.head, self.behind)

    def answers(self) -> Head | None:
        """The head as it stands, if the task has one."""
        return self.form.head if self.head is None else self.head()

    def parameters(self) -> dict[str, nn.Parameter]:
        """All that training changes, by name."""
        found = {f"prompt.{name}": parameter for name, parameter in self.module.named_parameters()}
        head = {} if self.head is None else dict(self.head.named_parameters())
        return found | {f"head.{name}": parameter for name, parameter in head.items()}

    def check(self, loss: float) -> None:
        """Raise `DivergedError` if the mean loss per target of the step at hand is not finite."""
        if not math.isfinite(loss):
            raise DivergedError(
                expected="a finite loss",
                got=f"{loss} at step {self.step + 1} of {self.name!r} (learning rate {self.peak_rate:g})",
                do="lower the learning rate, and look for broken rows in the data",
            )

    def set_rate(self) -> None:
        """Give the optimizer the rate of the step at hand."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * _rate(self.step, self.config)

    def count(self, loss: float) -> None:
        """Note that a step has been taken.

        Args:
            loss: its mean loss per target.
        """
        self.step += 1
        self.train_curve.append((self.step, loss))
        if self.step >= self.config.steps:
            self.finished = "steps"

    def judge(self, loss: float) -> bool:
        """Note the dev loss of the prompt as it stands; True if it is the best so far."""
        self.dev_curve.append((self.step, loss))
        better = loss < self.best_loss
        if better:
            self.best_loss, self.best_step, self.stale = loss, self.step, 0
            self.best = {name: tensor.detach().clone() for name, tensor in self.parameters().items()}
        else:
            self.stale += 1
            if self.config.patience is not None and self.stale >= self.config.patience:
                self.finished = self.finished or "early stop"
        return better

    @torch.no_grad()
    def restore_best(self) -> None:
        """Put back the parameters with the lowest dev loss, if there was a dev split."""
        for name, parameter in self.parameters().items():
            if self.best is not None:
                parameter.copy_(self.best[name])

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that changes, as tensors and as JSON-ready values."""
        tensors = {f"parameter/{name}": p.detach() for name, p in self.parameters().items()}
        tensors |= {f"best/{name}": tensor for name, tensor in (self.best or {}).items()}
        tensors["noise"] = self.noise.get_state()
        numbers: dict[str, dict[str, float]] = {}
        for index, slots in self.optimizer.state_dict()["state"].items():
            for key, value in slots.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{index}/{key}"] = value
                elif value is not None:
                    numbers.setdefault(str(index), {})[key] = value
        plain = {key: getattr(self, key) for key in _PLAIN}
        return tensors, plain | {"optimizer": numbers}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Take up a state made by `state`."""
        for name, parameter in self.parameters().items():
            tensor = tensors[f"parameter/{name}"]
            if tensor.shape != parameter.shape:  # copy_ would broadcast
                raise ValueError(f"{name} is {tuple(tensor.shape)}, not {tuple(parameter.shape)}")
            parameter.copy_(tensor)
        best = {name.removeprefix("best/"): t for name, t in tensors.items() if name.startswith("best/")}
        self.best = {name: t.to(self.device) for name, t in best.items()} or None
        self.noise.set_state(tensors["noise"])
        slots: dict[int, dict[str, Any]] = {int(i): dict(numbers) for i, numbers in plain["optimizer"].items()}
        for name, tensor in tensors.items():
            if name.startswith("optimizer/"):
                _, index, key = name.split("/")
                slots.setdefault(int(index), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        for key in _PLAIN:
            setattr(self, key, plain[key])
        self.train_curve = [(step, loss) for step, loss in plain["train_curve"]]
        self.dev_curve = [(step, loss) for step, loss in plain["dev_curve"]]

    @property
    def device(self) -> torch.device:
        """Where the module lives."""
        return next(self.module.parameters()).device


_PLAIN = (
    "step",
    "best_loss",
    "best_step",
    "stale",
    "train_curve",
    "dev_curve",
    "frozen_loss",
    "finished",
    "seconds",
)


# A prompt has few numbers and large steps: torch's usual momentum of 0.9 carries it past where it should stay
# (docs/log.md).
_BETAS = (0.5, 0.99)


def _optimizer(module: PromptModule, head: HeadModule | None, rate: float, config: TuneConfig) -> Optimizer:
    groups: list[dict[str, Any]] = [{"params": list(module.parameters()), "lr": rate, "peak": rate}]
    if config.optimizer == "adamw":
        groups[0]["betas"] = _BETAS
    if head is not None:
        own = config.head_learning_rate
        # A head's weights are no offsets from a start, so nothing pulls them back.
        groups.append({"params": list(head.parameters()), "lr": own, "peak": own, "weight_decay": 0.0})
    if config.optimizer == "adafactor":
        # Imported here, because it brings half of transformers with it.
        from transformers.optimization import Adafactor

        # As Prompt Tuning used it: constant rate in the parameters' own units, no relative steps.
        return Adafactor(groups, weight_decay=config.weight_decay, scale_parameter=False, relative_step=False)
    return AdamW(groups, weight_decay=config.weight_decay, fused=True)


def _rate(step: int, config: TuneConfig) -> float:
    """Share of the peak rate at a step, counted from 0."""
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(config.steps - warmup, 1)))
