"""Steps of Overture, of PEFT and of the frozen model in turn, so that a busy moment falls on all sides alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from statistics import median

import torch
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedModel

import overture as ov
from common.peft_loop import Batch, PeftTrainee, batch_of
from overture.methods import Method
from overture.tuning.batches import BatchOrder
from overture.tuning.events import Event, StepDone
from overture.tuning.example import TextExample

__all__ = ["STEPS", "WARM", "Round", "Times", "ratio", "timed"]

STEPS = 2
"""Of every side in a round."""
WARM = 3
"""Steps before the first round."""


@dataclass(slots=True)
class Times:
    """Seconds per step, one number a round: of all users together, of all one by one, and of the frozen model."""

    cohort: list[float] = field(default_factory=list)
    peft: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    """Real tokens of a step."""
    shuffled: list[float] = field(default_factory=list)
    """Of PEFT on batches of a shuffling data loader."""
    shuffled_tokens: list[int] = field(default_factory=list)
    """Real tokens of these."""


def wait() -> None:
    """Until the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def bare_pass(model: PreTrainedModel, batch: Batch, ahead: int) -> None:
    """The frozen model alone: forward to the positions that are learned, and backward to its input embeddings.

    With `ahead` tokens in front of every row, for methods whose virtual tokens the model reads.
    """
    front = {"input_ids": 5, "attention_mask": 1, "labels": -100}
    ids, mask, labels = (pad(batch[name], (ahead, 0), value=value) for name, value in front.items())
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    hidden = model.base_model(inputs_embeds=embedded, attention_mask=mask, use_cache=False)[0]
    learned = labels[:, 1:] != -100
    logits = model.get_output_embeddings()(hidden[:, :-1][learned])
    cross_entropy(logits.float(), labels[:, 1:][learned]).backward()


class Round:
    """Listens to a cohort, and lets the other sides run between its steps."""

    def __init__(
        self,
        model: PreTrainedModel,
        method: Method,
        examples: Sequence[Sequence[TextExample]],
        batch_size: int,
        rounds: int,
        *,
        shuffled: bool = False,
    ) -> None:
        self.model, self.times, self.shuffled = model, Times(), shuffled
        self.examples, self.batch_size = examples, batch_size
        self.ahead = 0 if isinstance(method, ov.PrefixTuning) else method.num_virtual_tokens
        self.orders = [BatchOrder(rows, batch_size, 0) for rows in examples]
        # A PEFT model patches its base model, so Overture's side has one of its own.
        self.others = [PeftTrainee(model, method, 1e-3) for _ in examples]
        self.last_step = WARM + rounds * STEPS
        self.began = 0.0

    def __call__(self, event: Event) -> None:
        """After every step of the cohort."""
        if not isinstance(event, StepDone):
            return
        wait()
        ended, number = time.perf_counter(), event.step
        if number == WARM:
            self._others(range(1), kept=False)  # warms up
        elif number > WARM and (number - WARM) % STEPS == 0:
            steps = range(number - STEPS, number)
            self.times.cohort.append((ended - self.began) / STEPS)
            self._others(steps)
        if number >= WARM and (number - WARM) % STEPS == 0:
            wait()
            self.began = time.perf_counter()

    def _others(self, steps: Sequence[int], *, kept: bool = True) -> None:
        target = self.model.device
        batches = [[order.batch(step) for step in steps] for order in self.orders]
        alone = [[batch_of(batch, target) for batch in own] for own in batches]
        joined = [batch_of([row for own in batches for row in own[i]], target) for i in range(len(steps))]

        def one_by_one(theirs: Sequence[Sequence[Batch]]) -> None:
            for trainee, own in zip(self.others, theirs, strict=True):
                for batch in own:
                    trainee.step(batch)

        peft = timed(lambda: one_by_one(alone)) / len(steps)
        bare = timed(lambda: [bare_pass(self.model, batch, self.ahead) for batch in joined]) / len(steps)
        if kept:
            self.times.peft.append(peft)
            self.times.bare.append(bare)
            if self.shuffled:
                loaded = [[self._loaded(rows, step) for step in steps] for rows in self.examples]
                self.times.shuffled.append(timed(lambda: one_by_one(loaded)) / len(steps))
                self.times.shuffled_tokens.append(_real([batch for own in loaded for batch in own]) // len(steps))
            self.times.tokens.append(_real(joined) // len(steps))

    def _loaded(self, rows: Sequence[TextExample], step: int) -> Batch:
        """A batch as a shuffling data loader makes it."""
        chosen = Random(step).sample(range(len(rows)), self.batch_size)
        return batch_of([rows[i] for i in chosen], self.model.device)


def _real(batches: Sequence[Batch]) -> int:
    return sum(int(batch["attention_mask"].sum()) for batch in batches)


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median of the rounds' ratios."""
    return median(a / b for a, b in zip(above, below, strict=True))
