"""How many prompts train at once, and which of them share a pass: planned from a budget of memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from overture.errors import ConfigError, DataError
from overture.spec import execution_device
from overture.tuning.memory import Holding, measured, parameter_bytes, row_bytes
from overture.tuning.passes import Fits, PassCost, Size
from overture.tuning.tasks import Task
from overture.tuning.trainee import Trainee

__all__ = ["Budget", "Plan", "largest_step", "plan_from", "planned", "too_large"]

# Allocators take more than they are asked for, because what was freed does not fit what comes next (docs/log.md).
_ALLOCATOR = 1.3
# A checkpoint is written from a copy of a copy of what it holds.
_COPIES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """A budget of memory, beside what the frozen model takes, and what it is spent on."""

    memory: int
    """Bytes to spend."""
    cost: PassCost
    """What a pass takes."""
    holding: Holding
    """What a prompt holds."""
    counts_rows: bool
    """Whether encoded rows are in the same memory."""
    checkpoints: bool
    """Whether the run writes checkpoints."""

    def fits(self, trainees: Collection[Trainee]) -> bool:
        """Whether prompts can train at once, if need be with a pass for each."""
        return self.taken(trainees) <= self.memory

    def taken(self, trainees: Collection[Trainee]) -> float:
        """Bytes that prompts take at least: all that they hold, and the largest of their passes or a checkpoint."""
        largest = max((self.cost.bytes(largest_step(one)) for one in trainees), default=0.0)
        return _ALLOCATOR * (self.held(trainees) + max(largest, self.saving(trainees)))

    def saving(self, trainees: Collection[Trainee]) -> float:
        """Bytes that writing a checkpoint of prompts takes for a while."""
        return self.checkpoints * _COPIES * self.holding.saved * sum(map(parameter_bytes, trainees))

    def held(self, trainees: Collection[Trainee]) -> float:
        """Bytes of tensors and rows that prompts hold all the time."""
        return sum(
            self.holding.training * parameter_bytes(one)
            + sum(buffer.nbytes for buffer in one.module.buffers())
            + self.counts_rows * row_bytes(one)
            for one in trainees
        )

    def room(self, trainees: Collection[Trainee]) -> Fits:
        """Whether a pass fits beside what prompts hold."""
        left = self.memory / _ALLOCATOR - self.held(trainees)
        return lambda size: self.cost.bytes(size) <= left


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How many prompts train at once."""

    slots: int
    """Most prompts in training at once."""
    budget: Budget | None = None
    """What they may take; None for whatever they take."""

    def fits(self, trainees: Collection[Trainee]) -> bool:
        """Whether prompts can train at once."""
        return self.budget is None or self.budget.fits(trainees)

    def room(self, trainees: Collection[Trainee]) -> Fits:
        """Whether a pass fits beside what prompts hold."""
        return _everything if self.budget is None else self.budget.room(trainees)


def planned(
    model: PreTrainedModel, task: Task, trainee: Trainee, filler: int, *, memory: int, slots: int, checkpoints: bool
) -> Plan:
    """As many slots as a budget allows, if all prompts are like this one.

    Args:
        model: the frozen model.
        task: what it is trained to answer.
        trainee: the first prompt; it stays as it is.
        filler: token id for padding.
        memory: bytes to spend.
        slots: no more than these.
        checkpoints: whether the run writes checkpoints.

    Raises:
        ConfigError: the budget is too small for this prompt alone.
    """
    cost, holding = measured(model, task, trainee, filler)
    counts_rows = execution_device(model).type == "cpu"
    budget = Budget(memory=memory, cost=cost, holding=holding, counts_rows=counts_rows, checkpoints=checkpoints)
    if not budget.fits([trainee]):
        error = too_large(trainee, Plan(slots=1, budget=budget))
        raise ConfigError(expected=error.expected, got=f"{error.got} ({trainee.name!r})", do=error.do)
    step, held, saving = largest_step(trainee), budget.held([trainee]), budget.saving([trainee])

    def taken(count: int) -> float:
        """By so many prompts like this one, all in one pass."""
        passing = cost.bytes(Size(count, count * step.rows, step.longest))
        return _ALLOCATOR * (count * held + max(passing, count * saving))

    return Plan(slots=next((n for n in range(1, slots) if taken(n + 1) > memory), slots), budget=budget)


def too_large(trainee: Trainee, plan: Plan) -> DataError:
    """The error for a prompt that does not fit into a budget by itself."""
    assert plan.budget is not None, "without a budget everything fits"
    step, needed = largest_step(trainee), plan.budget.taken([trainee])
    return DataError(
        expected=f"a prompt that can be trained in {in_megabytes(plan.budget.memory)} of memory",
        got=f"one that takes {in_megabytes(needed)}: steps of {step.rows} rows, of up to {step.longest} tokens",
        do="raise memory, or lower batch_size, max_length or the number of virtual tokens",
    )


def largest_step(trainee: Trainee) -> Size:
    """The largest pass that a prompt may ask for by itself."""
    return Size(1, min(trainee.config.batch_size, len(trainee.train)), len(trainee.longest))


def in_megabytes(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e6:,.1f} MB"


def plan_from(plain: Mapping[str, Any] | None) -> Plan | None:
    """The plan that `asdict` wrote down."""
    if plain is None:
        return None
    budget = plain["budget"]
    if budget is not None:
        cost, holding = PassCost(**budget["cost"]), Holding(**budget["holding"])
        budget = Budget(**{**budget, "cost": cost, "holding": holding})
    return Plan(slots=plain["slots"], budget=budget)


def _everything(size: Size) -> bool:
    return True
