"""The loop: prompts in training share every forward and backward pass, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from overture.errors import DivergedError, OvertureError
from overture.tuning.checkpoint import Ended, Paused, Saved, load_checkpoint, other_run, save_checkpoint
from overture.tuning.config import TuneConfig
from overture.tuning.events import CheckpointSaved, Evaluated, Failed, Finished, Listener, Planned, Started, StepDone
from overture.tuning.example import Example
from overture.tuning.finish import result_of
from overture.tuning.forward import Trained, frozen
from overture.tuning.identity import trainee_identity
from overture.tuning.losses import Share, backward, mean_losses
from overture.tuning.passes import Fits, Size, grouped
from overture.tuning.plan import Plan, largest_step, planned, too_large
from overture.tuning.results import TuneResult
from overture.tuning.tasks import Task
from overture.tuning.trainee import Trainee, noisy
from overture.tuning.update import update
from overture.tuning.waiting import Waiting

__all__ = ["Cohort", "Handover"]

Handover = Callable[[TuneResult], None]
"""Takes a result at the moment its prompt has finished."""


class Cohort:
    """Prompts trained together on one frozen model, each as if it were alone.

    A few train at once, and the others wait in order. As soon as one ends, the next takes its slot, and counts its
    steps, evaluations and schedule from there. Every row of a batch stands under its own prompt.

    Args:
        model: the frozen model.
        task: what it is trained to answer.
        config: the run's options.
        open_trainee: reads a prompt's rows and makes it ready to train; raises `OvertureError` if it cannot.
        slots: most prompts in training at once, 1 or more.
        memory: bytes for prompts and passes, by which there may be fewer slots; None for as many as they take.
        filler: token id for padding.
        listener: told of every event.
        hand_over: gets every result as it comes; None to keep them in `results`.
        checkpoint: file to save to and resume from; None for none.
        identity: digest of what all prompts have in common; a checkpoint of another run is refused.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        task: Task,
        config: TuneConfig,
        open_trainee: Callable[[str], Trainee],
        *,
        slots: int,
        memory: int | None,
        filler: int,
        listener: Listener,
        hand_over: Handover | None,
        checkpoint: Path | None,
        identity: str,
    ) -> None:
        self.model, self.task, self.config, self.filler = model, task, config, filler
        self.open_trainee, self.slots, self.memory = open_trainee, slots, memory
        self.tell, self.hand_over = listener, hand_over
        self.checkpoint, self.identity = checkpoint, identity
        self.turn = 0
        self.plan = Plan(slots=slots) if memory is None else None
        self.waiting = Waiting((), open_trainee, {}, checkpoint)
        self.running: dict[str, Trainee] = {}
        self.ended: dict[str, Ended] = {}
        self.failures: dict[str, OvertureError] = {}
        self._fits: Fits | None = None
        self._identities: dict[str, str] = {}

    @property
    def results(self) -> dict[str, TuneResult]:
        """Results that were not handed over."""
        return {name: one.result for name, one in self.ended.items() if one.result is not None}

    def run(self, names: Iterable[str], *, done: Collection[str] | None = None, resume: bool = False) -> None:
        """Train until every prompt has finished or failed.

        Args:
            names: the prompts, in the order in which they are to have a slot.
            done: those among them that are not to be trained, because their results exist elsewhere; None if only the
                checkpoint knows.
            resume: go on from the checkpoint, if there is one.

        Raises:
            CheckpointError: the checkpoint is damaged, or of another run.
            ConfigError: the memory is too small for one prompt.
        """
        began = time.perf_counter()
        save_every = self.config.checkpoint_every or max(self.config.steps // 10, 1)
        with frozen(self.model):
            self._line_up(names, done, resume)
            self._fill()
            while self.running:
                turn_began = time.perf_counter()
                self.turn += 1
                losses, tokens = self._step(list(self.running.values()))
                total, elapsed = self.turn + self._turns_left(), time.perf_counter() - began
                self.tell(StepDone(self.turn, total, losses, tokens, elapsed))
                self._evaluate([t for t in self.running.values() if self._due(t)])
                for trainee in self.running.values():
                    trainee.seconds += time.perf_counter() - turn_began
                self._finish([t for t in self.running.values() if t.finished])
                self._fill()
                if self.turn % save_every == 0 or not self.running:
                    self._save()

    def _line_up(self, names: Iterable[str], done: Collection[str] | None, resume: bool) -> None:
        """Take up the checkpoint, and line up those that are still to be trained."""
        elsewhere = set(done or ())
        wanted = dict.fromkeys(name for name in names if name not in elsewhere)
        paused: dict[str, Paused] = {}
        if resume and self.checkpoint is not None and self.checkpoint.exists():
            saved = load_checkpoint(self.checkpoint, self.identity)
            self.turn, self.failures, self.ended = saved.turn, dict(saved.failures), dict(saved.ended)
            if (saved.slots, saved.memory) == (self.slots, self.memory):
                self.plan = saved.plan
            paused = {name: one for name, one in saved.running.items() if name not in elsewhere}
            for name in paused:
                if name not in wanted:
                    raise other_run(self.checkpoint, name)
            for name in [name for name in self.ended if name in wanted]:
                if done is not None and self.ended[name].result is None:
                    del self.ended[name]  # it was handed over, and whoever took it does not have it
                else:
                    self._confirm(name, self.checkpoint)
        over = {*self.ended, *self.failures}
        left = [name for name in wanted if name not in over]
        self.waiting = Waiting(left, self.open_trainee, paused, self.checkpoint)

    def _confirm(self, name: str, checkpoint: Path) -> None:
        """See that a result that a checkpoint knows is what today's rows would give."""
        try:
            trainee = self.open_trainee(name)
        except OvertureError:
            del self.ended[name]  # so it waits for a slot, and fails by itself when it gets one
        else:
            if self.ended[name].identity != trainee_identity(trainee):
                raise other_run(checkpoint, name)

    def _fill(self) -> None:
        """Give free slots to those who wait, as many as there is memory for."""
        fresh: list[Trainee] = []
        while self.plan is None or len(self.running) < self.plan.slots:
            trainee = self.waiting.first(self._fail)
            if trainee is None:
                break
            if self.plan is None:
                self.plan = self._planned(trainee)
            if not self.plan.fits([trainee]):
                self.waiting.leave()
                self._fail(trainee.name, too_large(trainee, self.plan))
                continue
            if not self.plan.fits([*self.running.values(), trainee]):
                break  # it waits until others have ended
            self.waiting.leave()
            self.running[trainee.name] = trainee
            if self.checkpoint is not None:
                self._identities[trainee.name] = trainee_identity(trainee)
            if trainee.step == 0:
                fresh.append(trainee)
            self.tell(Started(trainee.name, trainee.step))
        if self.plan is not None:
            self._fits = self.plan.room(self.running.values())
        for one, loss in zip(fresh, self._measured([(t.untuned(), t.dev or t.train) for t in fresh]), strict=True):
            one.frozen_loss = loss

    def _planned(self, first: Trainee) -> Plan:
        """The plan for prompts like the first one, told to whoever listens."""
        assert self.memory is not None, "without a budget there is nothing to plan"
        saves = self.checkpoint is not None
        plan = planned(
            self.model, self.task, first, self.filler, memory=self.memory, slots=self.slots, checkpoints=saves
        )
        assert plan.budget is not None
        held, passing = plan.budget.held([first]), plan.budget.cost.bytes(largest_step(first))
        self.tell(Planned(plan.slots, self.memory, round(held), round(passing)))
        return plan

    def _step(self, active: Sequence[Trainee]) -> tuple[dict[str, float], int]:
        """One optimizer step of every prompt, on rows of its own."""
        assert self._fits is not None, "a plan comes before the first prompt"
        batches = [trainee.batches() for trainee in active]
        targets = [sum(e.num_targets for batch in passes for e in batch) for passes in batches]
        losses = dict.fromkeys((trainee.name for trainee in active), 0.0)
        for part in range(self.config.gradient_accumulation):
            rows = [passes[part] for passes in batches]
            for group in grouped([Size(1, len(batch), max(map(len, batch))) for batch in rows], self._fits):
                trained = noisy([active[i] for i in group])
                shares = [Share(one, rows[i], targets[i]) for one, i in zip(trained, group, strict=True)]
                parts = backward(self.model, self.task, self.config, shares, self.filler)
                for i, loss in zip(group, parts, strict=True):
                    losses[active[i].name] += loss
        for trainee in active:
            try:
                trainee.check(losses[trainee.name])
            except DivergedError as error:
                self._fail(trainee.name, error)
        going = [trainee for trainee in active if trainee.name in self.running]
        update(going)
        for trainee in going:
            trainee.count(losses[trainee.name])
        return losses, sum(len(e) for passes in batches for batch in passes for e in batch)

    def _due(self, trainee: Trainee) -> bool:
        """Whether a prompt stands at one of its own evaluations."""
        every = self.config.eval_every or max(self.config.steps // 10, 1)
        return bool(trainee.dev) and (trainee.step % every == 0 or trainee.step == self.config.steps)

    @torch.no_grad()
    def _evaluate(self, trainees: Sequence[Trainee]) -> None:
        losses = self._measured([(t.plain(), t.dev) for t in trainees])
        for trainee, loss in zip(trainees, losses, strict=True):
            best = trainee.judge(loss)
            self.tell(Evaluated(trainee.name, trainee.step, loss, best))

    def _finish(self, trainees: Sequence[Trainee]) -> None:
        """Hand over the results of prompts that are done, and free their slots."""
        for trainee in trainees:
            trainee.restore_best()
        # What was restored has been measured already.
        unmeasured = [t for t in trainees if t.best is None]
        with torch.no_grad():
            measured = self._measured([(t.plain(), t.dev or t.train) for t in unmeasured])
        losses = dict(zip([t.name for t in unmeasured], measured, strict=True))
        for trainee in trainees:
            try:
                result = result_of(self.model, self.task, trainee, losses.get(trainee.name, trainee.best_loss))
            except DivergedError as error:
                self._fail(trainee.name, error)
                continue
            if self.hand_over is not None:
                self.hand_over(result)
            del self.running[trainee.name]
            identity = self._identities.pop(trainee.name, "")
            self.ended[trainee.name] = Ended(identity, result if self.hand_over is None else None)
            self.tell(Finished(trainee.name, result.stop_reason, trainee.step))

    def _fail(self, name: str, error: OvertureError) -> None:
        self.running.pop(name, None)
        self._identities.pop(name, None)
        self.failures[name] = error
        self.tell(Failed(name, error))

    def _measured(self, pairs: Sequence[tuple[Trained, Sequence[Example]]]) -> list[float]:
        return mean_losses(self.model, self.task, pairs, self.config, self.filler, self._fits)

    def _turns_left(self) -> int:
        """Turns until all have taken all their steps, if slots are never idle."""
        left = [self.config.steps - trainee.step for trainee in self.running.values()]
        total, slots = sum(left) + len(self.waiting) * self.config.steps, max(len(left), 1)
        return max([-(-total // slots), *left])

    def _save(self) -> None:
        if self.checkpoint is not None:
            running = {name: Paused(self._identities[name], *t.state()) for name, t in self.running.items()}
            saved = Saved(
                turn=self.turn,
                running=running | self.waiting.paused,
                ended=self.ended,
                failures=self.failures,
                slots=self.slots,
                memory=self.memory,
                plan=self.plan,
            )
            save_checkpoint(self.checkpoint, self.identity, saved)
            self.tell(CheckpointSaved(self.turn, self.checkpoint))
