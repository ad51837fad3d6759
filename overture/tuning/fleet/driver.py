"""The driver's loop: hands out users, takes results to where they belong, and has the users of dead workers taken over.

Only the driver publishes. Its results are on the disk before a worker hears so; the store's credentials and keys stay
with it; and an SQLite store, which several machines could not share, serves a fleet as well.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from os import PathLike
from pathlib import Path

from overture.errors import BaseMismatchError, FleetError, OvertureError
from overture.methods import Method
from overture.prompt import BaseModelId
from overture.tuning.cohort import Handover
from overture.tuning.config import TuneConfig
from overture.tuning.data import Source, rows_of
from overture.tuning.events import Event, Failed, Finished, Listener, Started
from overture.tuning.fleet.messages import Crew, Ended, HandOut, Message, Ready, Shipment, Stopped
from overture.tuning.fleet.plan import Part, Plan
from overture.tuning.results import CohortResult

__all__ = ["tune_fleet"]

_PATIENCE = 5.0
"""Seconds to wait for news at most; more come as soon as there are any."""
_DEATHS = 3
"""Deaths of workers that a user may have been in training at, and that each worker's place may see with nobody in
training."""


def tune_fleet(
    crew: Crew,
    method: Method,
    data: Mapping[str, Source],
    *,
    base: BaseModelId,
    on_result: Handover,
    workers: int,
    dev: Mapping[str, Source] | None = None,
    task: str | None = None,
    config: TuneConfig | None = None,
    slots: int | None = None,
    memory: int | str | None = None,
    done: Collection[str] = (),
    run_dir: str | PathLike[str] | None = None,
    resume: bool = False,
    on_event: Listener | None = None,
) -> CohortResult:
    """Tune a prompt for every user on the workers of a crew. Each comes out as if it had been tuned alone.

    Args:
        crew: the workers.
        method: one method for all.
        data: rows by user; they are read here, when their turn comes.
        base: the model that every worker must have loaded.
        on_result: called here with every result; when it returns, the user is done, whatever happens to the worker.
        workers: how many to keep at work.
        dev: held-out rows by user; who is left out keeps a share of their own.
        task: what the model must be for; None for whatever it is for.
        config: options of the run.
        slots: users that a worker trains at once; None for as many as its memory allows.
        memory: memory for training, of each worker.
        done: users who are not to be tuned.
        run_dir: a folder for the state of users in training, which workers reach under the same path: who takes over
            the users of a dead worker goes on from there. None, or one that cannot be seen: they start again.
        resume: go on from what is in `run_dir`.
        on_event: called with every `Event` of every worker.

    Returns:
        No results, which went to `on_result`, but the names of the finished, and the errors of those that failed.

    Raises:
        FleetError: workers keep dying with nobody in training, or one cannot go on.
        BaseMismatchError: a worker has loaded another model.
        OvertureError: whatever `tune_many` raises.
    """
    names = [name for name in data if name not in set(done)]
    plan = Plan(names, workers=workers, slots=slots, folder=None if run_dir is None else Path(run_dir), resume=resume)
    drive = _Drive(crew, plan, data, dev or {}, base, on_result, on_event or _ignore)
    drive.common = {"method": method, "config": config or TuneConfig(), "task": task, "slots": slots, "memory": memory}
    return drive.run(workers)


class _Drive:
    """A run of a fleet, as far as it has come."""

    common: Mapping[str, object]

    def __init__(
        self,
        crew: Crew,
        plan: Plan,
        data: Mapping[str, Source],
        dev: Mapping[str, Source],
        base: BaseModelId,
        on_result: Handover,
        tell: Listener,
    ) -> None:
        self.crew, self.plan, self.data, self.dev, self.base = crew, plan, data, dev, base
        self.on_result, self.tell = on_result, tell
        self.idle: list[int] = []
        self.busy: dict[int, Part] = {}
        self.starting = crew.present()
        self.finished: list[str] = []
        self.failures: dict[str, OvertureError] = {}
        self.deaths = 0

    def run(self, workers: int) -> CohortResult:
        """Until nobody is left."""
        while True:
            self._assign()
            if not self.busy and self.plan.empty:
                return CohortResult({}, self.failures, self.finished)
            self._staff(workers)
            for worker, said in self.crew.wait(_PATIENCE):
                if said is None:
                    self._bury(worker, workers)
                for message in said or ():
                    self._hear(worker, message)

    def _staff(self, workers: int) -> None:
        """Have as many workers as there is work for."""
        present = len(self.idle) + len(self.busy) + len(self.starting)
        wanted = min(workers, len(self.busy) + len(self.plan.again) + len(self.plan.waiting))
        for _ in range(wanted - present):
            self.starting.add(self.crew.hire())

    def _assign(self) -> None:
        while self.idle and (part := self.plan.take()) is not None:
            users = self._hand_out(part)
            if users.data:
                worker = self.idle.pop()
                self.busy[worker] = part
                self.crew.give(worker, users)
            else:  # nobody in it had rows that can be read
                self.plan.ended(part)

    def _hand_out(self, part: Part) -> HandOut:
        data, dev = {}, {}
        for name in part.names:
            if name not in part.left:
                continue
            try:
                data[name] = rows_of(self.data, name)
                if name in self.dev:
                    dev[name] = rows_of(self.dev, name, kind="dev")
            except OvertureError as error:
                data.pop(name, None)
                self._failed(part, name, error)
                self.tell(Failed(name, error))
        over = tuple(name for name in part.names if name not in part.left)
        return HandOut(data=data, dev=dev, folder=part.folder, over=over, **self.common)  # type: ignore[arg-type]

    def _hear(self, worker: int, message: Message) -> None:
        match message:
            case Ready():
                self._check(message)
                self.starting.discard(worker)
                self.idle.append(worker)
            case Shipment():
                result = message.result()
                self.on_result(result)
                self._over(self.busy[worker], result.name)
                self.finished.append(result.name)
                self.deaths = 0
                self.crew.confirm(worker, result.name)
            case Ended():
                part = self.busy.pop(worker)
                for name, error in message.failures.items():
                    if name in part.left:
                        self._failed(part, name, error)
                assert not part.left, part.left
                self.plan.ended(part)
                self.idle.append(worker)
            case Stopped():
                raise message.error
            case _:
                self._note(self.busy[worker], message)
                self.tell(message)

    def _note(self, part: Part, event: Event) -> None:
        if isinstance(event, Started):
            part.running.add(event.name)
        elif isinstance(event, Failed):
            self._failed(part, event.name, event.error)
        elif isinstance(event, Finished):
            assert event.name not in part.left, event.name

    def _check(self, ready: Ready) -> None:
        if ready.base.digest != self.base.digest:
            raise BaseMismatchError(
                expected=f"every worker to load the same model, with the digest {self.base.digest[:12]}",
                got=f"one with the digest {ready.base.digest[:12]}",
                do="put the same files under the model's name on every machine",
            )

    def _bury(self, worker: int, workers: int) -> None:
        """Have a dead worker's users taken over."""
        self.starting.discard(worker)
        if worker in self.idle:
            self.idle.remove(worker)
        part = self.busy.pop(worker, None)
        running = [] if part is None else self.plan.lost(part)
        for name in running:
            if self.plan.deaths[name] >= _DEATHS:
                self._give_up(name)
        if not running:
            self.deaths += 1
            if self.deaths >= _DEATHS * workers:
                raise FleetError(
                    expected="workers that live until they are given users",
                    got=f"{self.deaths} that died before, one after the other",
                    do="give each worker more memory, or use fewer of them; Ray's logs say how they died",
                )

    def _give_up(self, name: str) -> None:
        error = FleetError(
            expected="a worker that outlives the user's training",
            got=f"{self.plan.deaths[name]} workers that died while they trained {name!r}, at last alone",
            do="give workers more memory, or shorten the longest rows (--max-length with --truncate)",
        )
        for part in list(self.plan.again):
            if name in part.left:
                self._failed(part, name, error)
                if not part.left:
                    self.plan.again.remove(part)
                    self.plan.ended(part)
        self.tell(Failed(name, error))

    def _failed(self, part: Part, name: str, error: OvertureError) -> None:
        self._over(part, name)
        self.failures[name] = error

    @staticmethod
    def _over(part: Part, name: str) -> None:
        part.left.discard(name)
        part.running.discard(name)


def _ignore(event: Event) -> None:
    """No listener."""
