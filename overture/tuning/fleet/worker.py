"""One worker of a fleet. It knows a model, and neither the store nor the data's place."""

from __future__ import annotations

import os
import queue
import socket
import threading

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from overture.errors import FleetError, OvertureError
from overture.spec import ModelSpec
from overture.tuning.api import tune_many
from overture.tuning.events import CheckpointSaved, Event
from overture.tuning.fleet.messages import Ended, HandOut, Load, Message, Ready, Shipment, Stopped
from overture.tuning.results import TuneResult
from overture.tuning.tasks import task_for

__all__ = ["Worker"]


class Worker:
    """Tunes the users it is given. One thread works (`open`, `tune`), another reads what it says (`poll`).

    Args:
        load: loads the base model.
        task: what the model must be for; None for whatever it is for.
        threads: CPU threads of this worker.
        device: where the model goes, such as `cuda`.
    """

    def __init__(self, load: Load, task: str | None, threads: int, device: str) -> None:
        self.load, self.task, self.threads, self.device = load, task, threads, device
        self.model: PreTrainedModel | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self._said: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._confirmed: set[str] = set()
        self._news = threading.Condition()

    def open(self) -> None:
        """Load the model, and say `Ready`."""
        try:
            torch.set_num_threads(self.threads)
            model, self.tokenizer = self.load()
            self.model = model.to(self.device)  # type: ignore[arg-type]
            base, task = ModelSpec.of(self.model).base, task_for(self.model, self.task).name
            self._said.put(Ready(base, task, socket.gethostname(), os.getpid()))
        except Exception as error:
            self._said.put(Stopped(_explained(error)))

    def tune(self, users: HandOut) -> None:
        """Tune users; results, events and the end are said as they come."""
        assert self.model is not None
        assert self.tokenizer is not None
        try:
            torch.set_num_threads(self.threads)  # of this thread
            done = tune_many(
                self.model,
                self.tokenizer,
                users.method,
                users.data,
                dev=users.dev,
                task=users.task,
                config=users.config,
                slots=users.slots,
                memory=users.memory,
                done=users.over,
                on_result=self._ship,
                on_event=self._tell,
                run_dir=users.folder,
                resume=users.folder is not None,
            )
            self._said.put(Ended(done.failures))
        except Exception as error:
            self._said.put(Stopped(_explained(error)))

    def poll(self, seconds: float, confirmed: tuple[str, ...] = ()) -> list[Message]:
        """What there is to say: waits for something, at most so long. `confirmed` are results that have arrived."""
        with self._news:
            self._confirmed.update(confirmed)
            self._news.notify_all()
        said = []
        try:
            said.append(self._said.get(timeout=seconds))
            while True:
                said.append(self._said.get_nowait())
        except queue.Empty:
            return said

    def _ship(self, result: TuneResult) -> None:
        # Until it is confirmed the user counts as in training, in this worker's checkpoints too: if the worker dies
        # now, somebody will finish the user once more, and nobody will be missing.
        self._said.put(Shipment.of(result))
        with self._news:
            self._news.wait_for(lambda: result.name in self._confirmed)
            self._confirmed.remove(result.name)

    def _tell(self, event: Event) -> None:
        if not isinstance(event, CheckpointSaved):
            self._said.put(event)


def _explained(error: Exception) -> OvertureError:
    if isinstance(error, OvertureError):
        return error
    return FleetError(
        expected="a worker that can do its work",
        got=f"{type(error).__name__}: {error}",
        do="out of memory: use fewer slots or more workers' memory; else report it with the command and this line",
    )
