"""Overture's side: `ov.tune`, as anybody would call it."""

from __future__ import annotations

import overture as ov
from benchmarks.quality.backbones import MAX_LENGTH, loaded, rows_for
from benchmarks.quality.fit import Budget, Clock, Fit
from benchmarks.quality.tasks import Task
from overture.methods import Method
from overture.tuning.events import Evaluated, Event, StepDone

__all__ = ["HEAD_RATE", "LENGTH", "METHODS", "tuned"]

LENGTH = {"prefix": 16, "prompt": 20, "p-tuning": 20}
"""Virtual tokens, the same on PEFT's side."""
HEAD_RATE = 0.1
"""Step size of a classifier beside a prompt, on both sides (docs/benchmarks/encoders.md)."""


def _method(kind: str, option: str, start: str) -> Method:
    length = LENGTH[kind]
    init = "vocabulary" if option.startswith("vocabulary") else "random" if option.startswith("random") else start
    if kind == "prefix":
        return ov.PrefixTuning(num_virtual_tokens=length, init=init, reparameterization="network" in option)
    if kind == "prompt":
        return ov.PromptTuning(num_virtual_tokens=length, init=init)
    encoder = next(name for name in ("lstm", "mlp", "none") if name in option)
    return ov.PTuning(num_virtual_tokens=length, init=init, encoder=encoder, residual="alone" not in option)


METHODS = ("prefix", "prompt", "p-tuning")


def tuned(backbone: str, task: Task, kind: str, option: str, rate: float, seed: int, budget: Budget) -> Fit:
    """A prompt of Overture's.

    Args:
        kind: one of `METHODS`.
        option: where it starts (`words`, `vocabulary`, `random`), and behind a comma what it is trained through.
        rate: peak step size, in units of the model's own scale.
    """
    model, tokenizer = loaded(backbone, task, seed)
    config = ov.TuneConfig(
        steps=budget.steps,
        batch_size=budget.batch_size,
        learning_rate=rate,
        head_learning_rate=HEAD_RATE,
        seed=seed,
        max_length=MAX_LENGTH[backbone] + LENGTH[kind],
        truncate=True,
        eval_every=budget.eval_every,
    )
    listener = _Listener(budget)
    result = ov.tune(
        model,
        tokenizer,
        _method(kind, option, task.start),
        rows_for(backbone, task, task.train),
        dev=rows_for(backbone, task, task.dev),
        config=config,
        on_event=listener,
    )
    return Fit(
        model,
        tokenizer,
        result.prompt,
        list(result.dev_curve),
        listener.clock.marks,
        result.trained_parameters,
        result.stored_parameters,
    )


class _Listener:
    """Stops the clock while the dev rows are measured. What is measured before the first step counts as training."""

    def __init__(self, budget: Budget) -> None:
        self.clock, self.budget = Clock(), budget

    def __call__(self, event: Event) -> None:
        due = isinstance(event, StepDone) and (
            event.step % self.budget.eval_every == 0 or event.step == self.budget.steps
        )
        if due:
            self.clock.pause()
        elif isinstance(event, Evaluated):
            self.clock.mark(event.step)
            self.clock.go_on()
