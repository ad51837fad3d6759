"""The continuous batcher: a thread that answers many jobs at once, each as if it were alone."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from overture.errors import ConfigError
from overture.serve.engine.cache import Shelves
from overture.serve.engine.config import EngineConfig
from overture.serve.engine.core import Core
from overture.serve.engine.failure import as_failure, log_failure
from overture.serve.engine.loader import Loader
from overture.serve.engine.plan import Planner
from overture.serve.engine.prefixes import Prefixes
from overture.serve.engine.row import Deliver, Row
from overture.serve.engine.stats import EngineStats
from overture.serve.engine.step import Stepper
from overture.serve.requests import Ended, Event, Job
from overture.spec import unwrapped
from overture.store import PromptStore

__all__ = ["Batcher"]


@dataclass(eq=False, slots=True)
class _Entry:
    """A job under way."""

    job: Job
    deliver: Deliver
    row: Row | None = None
    """None while the job is being loaded."""


class Batcher:
    """Answers jobs with one frozen model, in a thread of its own: rows join and leave at every step.

    Args:
        model: a decoder of transformers whose rows can be held as keys and values.
        tokenizer: its tokenizer.
        store: where the jobs' prompts are.
        config: how much to take on at a time.

    Raises:
        UnsupportedModelError: the model cannot be served in this way.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        store: PromptStore,
        config: EngineConfig | None = None,
    ) -> None:
        self.config = config or EngineConfig()
        inner = unwrapped(model)
        stepper = Stepper(inner)
        shelves = Shelves(stepper.layers, self.config.cache_bytes, stepper.spec.max_positions)
        self._loader = Loader(inner, tokenizer, store, shelves.longest)
        self._prefixes = Prefixes(inner, stepper.layers, self.config.prefix_bytes)
        self._core = Core(stepper, Planner(shelves, self.config, self._prefixes), stepper.ends)
        self._entries: dict[str, _Entry] = {}
        self._unloaded: OrderedDict[str, deque[_Entry]] = OrderedDict()
        """By tenant, who take turns here, too: a tenant's long texts do not keep others from being read."""
        self._ended: Counter[str] = Counter()
        self._messages: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._closed = self._stopped = False
        self._loaders = ThreadPoolExecutor(self.config.loaders, thread_name_prefix="overture-loader")
        self._thread = threading.Thread(target=self._run, name="overture-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it takes jobs: False once it is closed, or broken with its device."""
        return not self._closed

    def submit(self, job: Job, deliver: Deliver) -> None:
        """Take a job on. `deliver` is called in the engine's thread, with `Ended` last; it must return at once.

        Raises:
            ConfigError: the engine is closed, or a job with this id is under way.
        """
        entry = _Entry(job, deliver)
        with self._changed:
            if self._closed:
                raise ConfigError(expected="an engine that runs", got="one that was closed", do="make another Batcher")
            if job.id in self._entries:
                raise ConfigError(
                    expected="a job with an id of its own", got="one that is under way", do="choose another id"
                )
            self._entries[job.id] = entry
            self._unloaded.setdefault(job.tenant, deque()).append(entry)
            self._loaders.submit(self._load_next)

    def cancel(self, id: str) -> None:
        """Stop a job; its row is free for others at the next step. An unknown or ended job is left alone."""
        entry = self._entries.get(id)
        if entry is not None:
            self._tell(lambda: self._cancel(entry))

    def close(self, *, drain: float = 0.0) -> None:
        """Take no more jobs, finish those under way for at most `drain` seconds, cancel the rest."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._entries, timeout=drain)
            left = list(self._entries)
        for id in left:
            self.cancel(id)
        with self._changed:
            self._changed.wait_for(lambda: not self._entries)
            self._stopped = True
            self._changed.notify_all()
        self._loaders.shutdown()
        self._thread.join()

    def stats(self) -> EngineStats:
        """The state of the engine, and counters since its start."""
        core, planner = self._core, self._core.planner
        with self._changed:
            loading = sum(entry.row is None for entry in self._entries.values())
            ended = dict(self._ended)
        return EngineStats(
            running=len(planner.rows),
            waiting=len(planner.queue),
            loading=loading,
            prompt_tokens=core.prompt_tokens,
            completion_tokens=core.completion_tokens,
            steps=core.steps,
            step_seconds=core.seconds,
            last_step_seconds=core.last_seconds,
            ended=ended,
            preemptions=planner.preemptions,
            cache_bytes=planner.shelves.bytes,
            cache_budget=planner.shelves.budget,
            prefixes=self._prefixes.stats(),
        )

    def _tell(self, message: Callable[[], None]) -> None:
        with self._changed:
            self._messages.append(message)
            self._changed.notify_all()

    def _load_next(self) -> None:
        """In a loader's thread: load the first job of the tenant whose turn it is."""
        with self._changed:
            tenant, entries = self._unloaded.popitem(last=False)
            entry = entries.popleft()
            if entries:
                self._unloaded[tenant] = entries
        self._load(entry)

    def _load(self, entry: _Entry) -> None:
        """Make a job a row, or say why it cannot be."""
        if self._entries.get(entry.job.id) is not entry:
            return  # cancelled before it was its turn
        try:
            row = self._loader.load(entry.job, lambda event: self._deliver(entry, event))
        except Exception as error:
            failure = as_failure("a job could not be loaded", error)
            self._tell(lambda: self._deliver(entry, Ended("error", 0, 0, failure)))
        else:
            self._tell(lambda: self._arrive(entry, row))

    # What follows runs in the engine's thread.

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:  # such as a device that is gone: nothing here can be answered any more
            failure = as_failure("the engine has stopped", error)
            with self._changed:
                self._closed = self._stopped = True
            for entry in list(self._entries.values()):
                self._deliver(entry, Ended("error", 0, 0, failure))

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._messages or self._core.busy or self._stopped)
                if self._stopped:
                    return
                count = len(self._messages)
            for _ in range(count):
                # Not kept a moment longer: it holds a prompt, which may be erased.
                self._messages.popleft()()
            if self._core.busy:
                self._core.step()

    def _arrive(self, entry: _Entry, row: Row) -> None:
        if self._entries.get(entry.job.id) is entry:
            entry.row = row
            self._core.arrive(row)

    def _cancel(self, entry: _Entry) -> None:
        if self._entries.get(entry.job.id) is not entry:
            return
        if entry.row is None:
            self._deliver(entry, Ended("cancelled", 0, 0))
        else:
            self._core.stop(entry.row, "cancelled")

    def _deliver(self, entry: _Entry, event: Event) -> None:
        """Hand an event out, strike a job off that ends, and go on whatever the other side does."""
        if self._entries.get(entry.job.id) is not entry:
            return
        try:
            entry.deliver(event)
        except Exception as error:
            log_failure("an event could not be delivered", error)  # nobody is there to hear of it
            if not isinstance(event, Ended):
                self._tell(lambda: self._cancel(entry))
        if isinstance(event, Ended):
            with self._changed:
                del self._entries[entry.job.id]
                # The row knows the entry: with this, what it holds goes now, and not when garbage is collected.
                entry.row = None
                self._ended[event.reason] += 1
                self._changed.notify_all()
