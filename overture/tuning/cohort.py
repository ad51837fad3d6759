"""The loop: prompts in training share every forward and backward pass, and nothing else."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from overture.errors import CheckpointError, DivergedError, OvertureError
from overture.runtime.recompute import checkpointed_blocks, checkpointing
from overture.tuning.checkpoint import Ended, Paused, Saved, load_checkpoint, other_run, save_checkpoint
from overture.tuning.config import TuneConfig
from overture.tuning.events import CheckpointSaved, Evaluated, Failed, Finished, Listener, Started, StepDone
from overture.tuning.example import Example
from overture.tuning.finish import result_of
from overture.tuning.forward import Trained, frozen
from overture.tuning.identity import trainee_identity
from overture.tuning.losses import by_owner, mean_losses, precision
from overture.tuning.results import TuneResult
from overture.tuning.tasks import Task
from overture.tuning.trainee import Trainee

__all__ = ["Cohort", "Handover"]

Handover = Callable[[TuneResult], None]
"""Takes a result at the moment its prompt has finished."""


class Cohort:
    """Prompts trained together on one frozen model, each as if it were alone.

    At most `slots` prompts train at once. The others wait in order; as soon as one ends, the next takes its slot, and
    counts its steps, evaluations and schedule from there. Every row of a batch stands under its own prompt; the losses
    of different prompts are added, so that each prompt gets the gradient of its own mean loss.

    Args:
        model: the frozen model.
        task: what it is trained to answer.
        config: the run's options.
        open_trainee: reads a prompt's rows and makes it ready to train; raises `OvertureError` if it cannot.
        slots: most prompts in training at once, 1 or more.
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
        filler: int,
        listener: Listener,
        hand_over: Handover | None,
        checkpoint: Path | None,
        identity: str,
    ) -> None:
        self.model, self.task, self.config, self.filler = model, task, config, filler
        self.open_trainee, self.slots, self.tell, self.hand_over = open_trainee, slots, listener, hand_over
        self.checkpoint, self.identity = checkpoint, identity
        self.turn = 0
        self.waiting: deque[str] = deque()
        self.running: dict[str, Trainee] = {}
        self.ended: dict[str, Ended] = {}
        self.failures: dict[str, OvertureError] = {}
        self._paused: dict[str, Paused] = {}
        self._identities: dict[str, str] = {}

    @property
    def results(self) -> dict[str, TuneResult]:
        """Results that were not handed over."""
        return {name: one.result for name, one in self.ended.items() if one.result is not None}

    def resume(self) -> None:
        """Take up the checkpoint, if there is one: `run` goes on from there.

        Raises:
            CheckpointError: it is damaged, or of another run.
        """
        if self.checkpoint is None or not self.checkpoint.exists():
            return
        saved = load_checkpoint(self.checkpoint, self.identity)
        self.turn, self.failures = saved.turn, dict(saved.failures)
        self._paused, self.ended = dict(saved.running), dict(saved.ended)

    def run(self, names: Iterable[str], done: Collection[str] = ()) -> None:
        """Train until every prompt has finished or failed.

        Args:
            names: the prompts, in the order in which they are to have a slot.
            done: those among them that are not to be trained, because their results exist elsewhere.
        """
        began = time.perf_counter()
        save_every = self.config.checkpoint_every or max(self.config.steps // 10, 1)
        with frozen(self.model):
            self._line_up(names, done)
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

    def _line_up(self, names: Iterable[str], done: Collection[str]) -> None:
        """Those that a checkpoint found in training come first, so that they meet again in the batches they shared."""
        skipped = set(done)
        wanted = dict.fromkeys(name for name in names if name not in skipped)
        self._paused = {name: one for name, one in self._paused.items() if name not in skipped}
        for name in self._paused:
            if name not in wanted:
                raise self._other_run(name)
        for name in self.results:
            if name in wanted:
                self._confirm(name)
        over = {*self._paused, *self.ended, *self.failures}
        self.waiting = deque([*self._paused, *(name for name in wanted if name not in over)])

    def _confirm(self, name: str) -> None:
        """See that a result from a checkpoint, to be given out again, is what today's rows would give."""
        try:
            trainee = self.open_trainee(name)
        except OvertureError:
            del self.ended[name]  # so it waits for a slot, and fails by itself when it gets one
        else:
            if self.ended[name].identity != trainee_identity(trainee):
                raise self._other_run(name)

    def _fill(self) -> None:
        """Give free slots to those who wait; one whose rows cannot be used fails and takes none."""
        fresh: list[Trainee] = []
        while self.waiting and len(self.running) < self.slots:
            name = self.waiting.popleft()
            paused = self._paused.pop(name, None)
            try:
                trainee = self.open_trainee(name)
            except OvertureError as error:
                self._fail(name, error)
                continue
            if self.checkpoint is not None:
                self._identities[name] = trainee_identity(trainee)
            if paused is None:
                fresh.append(trainee)
            elif paused.identity != self._identities[name]:
                raise self._other_run(name)
            else:
                assert self.checkpoint is not None, "what is paused comes from a checkpoint"
                paused.load_into(trainee, self.checkpoint)
            self.running[name] = trainee
            self.tell(Started(name, trainee.step))
        for trainee, loss in zip(fresh, self._measured([(t.untuned(), t.dev or t.train) for t in fresh]), strict=True):
            trainee.frozen_loss = loss

    def _step(self, active: Sequence[Trainee]) -> tuple[dict[str, float], int]:
        batches = [trainee.batches() for trainee in active]
        targets = [sum(e.num_targets for batch in passes for e in batch) for passes in batches]
        totals = torch.zeros(len(active))
        for part in range(self.config.gradient_accumulation):
            rows: list[Trained] = []
            owners: list[int] = []
            examples: list[Example] = []
            for owner, (trainee, passes) in enumerate(zip(active, batches, strict=True)):
                rows += [trainee.noisy()] * len(passes[part])
                owners += [owner] * len(passes[part])
                examples += passes[part]
            with (
                precision(self.model, self.config),
                checkpointed_blocks(self.model, checkpointing() if self.config.gradient_checkpointing else None),
            ):
                sums = self.task.losses(self.model, rows, examples, self.filler)
            means = by_owner(sums, owners, len(active)) / torch.tensor(targets, device=sums.device)
            means.sum().backward()
            totals += means.detach().cpu()
        losses = dict(zip([t.name for t in active], totals.tolist(), strict=True))
        for trainee in active:
            try:
                trainee.update(losses[trainee.name])
            except DivergedError as error:
                self._fail(trainee.name, error)
        tokens = sum(len(e.ids) for passes in batches for batch in passes for e in batch)
        return losses, tokens

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
        return mean_losses(self.model, self.task, pairs, self.config, self.filler)

    def _turns_left(self) -> int:
        """Turns until all have taken all their steps: the longest is never done sooner, and slots are never idle."""
        left = [self.config.steps - trainee.step for trainee in self.running.values()]
        shared = -(-(sum(left) + len(self.waiting) * self.config.steps) // self.slots)
        return max(*left, shared) if left else shared

    def _save(self) -> None:
        if self.checkpoint is not None:
            running = {name: Paused(self._identities[name], *t.state()) for name, t in self.running.items()}
            saved = Saved(self.turn, running | self._paused, self.ended, self.failures)
            save_checkpoint(self.checkpoint, self.identity, saved)
            self.tell(CheckpointSaved(self.turn, self.checkpoint))

    def _other_run(self, name: str) -> CheckpointError:
        assert self.checkpoint is not None, "nothing is resumed without a checkpoint"
        return other_run(self.checkpoint, name)
