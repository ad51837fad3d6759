"""A fleet whose workers are threads of this process and die when told. Oracle: `tune_many` in one process."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from overture.errors import BaseMismatchError, ConfigError, DataError, FleetError
from overture.methods import PrefixTuning
from overture.spec import ModelSpec
from overture.tuning.api import tune_many
from overture.tuning.config import TuneConfig
from overture.tuning.events import Event, Failed, Finished, Started, StepDone
from overture.tuning.fleet.driver import tune_fleet
from overture.tuning.fleet.messages import HandOut, Message, Ready, Shipment
from overture.tuning.fleet.worker import Worker
from overture.tuning.results import TuneResult

METHOD = PrefixTuning(num_virtual_tokens=2, reparameterization=False)
CONFIG = TuneConfig(steps=6, batch_size=2, eval_every=2, checkpoint_every=2, dev_fraction=0.0)
WORDS = ("red", "green", "blue", "one", "two", "three", "ship")

Dies = Callable[[int, Message], bool]


class _Silent:
    """What a dead worker speaks into, and where it looks for what was confirmed."""

    def put(self, message: object) -> None:
        raise SystemExit

    def __contains__(self, name: object) -> bool:
        raise SystemExit


class Threads:
    """A crew of threads. `dies` says of each message whether its worker dies instead of saying it.

    Whoever is hired is heard first when it is ready, so that each has its part, however late a thread begins.
    """

    def __init__(self, load: Any, dies: Dies = lambda worker, message: False) -> None:
        self.load, self.dies = load, dies
        self.workers: dict[int, Worker] = {}
        self.confirmed: dict[int, list[str]] = {}
        self.working: dict[int, threading.Thread] = {}
        self.heard: set[int] = set()
        self.hired = 0

    def hire(self) -> int:
        self.hired += 1
        self.workers[self.hired], self.confirmed[self.hired] = Worker(self.load, None, 1, "cpu"), []
        self._start(self.hired, self.workers[self.hired].open)
        return self.hired

    def present(self) -> set[int]:
        return set(self.workers)

    def give(self, worker: int, users: HandOut) -> None:
        def work() -> None:
            with suppress(SystemExit):
                self.workers[worker].tune(users)

        self._start(worker, work)

    def _start(self, worker: int, work: Callable[[], None]) -> None:
        self.working[worker] = threading.Thread(target=work, daemon=True)
        self.working[worker].start()

    def kill(self, number: int) -> None:
        """End a worker wherever it is; when this returns it writes to no folder any more."""
        worker = self.workers.pop(number)
        worker._said = worker._confirmed = _Silent()  # type: ignore[assignment]
        with worker._news:
            worker._news.notify_all()
        self.working[number].join(60)
        assert not self.working[number].is_alive()

    def confirm(self, worker: int, name: str) -> None:
        self.confirmed[worker].append(name)

    def wait(self, seconds: float) -> list[tuple[int, list[Message] | None]]:
        heard: list[tuple[int, list[Message] | None]] = []
        for number, worker in list(self.workers.items()):
            arrived, self.confirmed[number] = tuple(self.confirmed[number]), []
            said = worker.poll(0.01 if number in self.heard else 60, arrived)
            self.heard.add(number)
            last = next((i for i, message in enumerate(said) if self.dies(number, message)), None)
            heard.append((number, said[:last]))
            if last is not None:
                self.kill(number)
                heard.append((number, None))
        return heard


@pytest.fixture
def load(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Any:
    """A model of one's own for each worker, in fp64."""
    weights = model.double().state_dict()

    def make() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
        made = LlamaForCausalLM(model.config).double().eval()
        made.load_state_dict(weights)
        return made, tokenizer

    return make


@pytest.fixture
def users(rows: Any) -> dict[str, Any]:
    return {word: rows(word, 5) for word in WORDS}


class Run:
    """One run of a fleet, and what came of it."""

    def __init__(self, load: Any, dies: Dies = lambda worker, message: False) -> None:
        self.crew = Threads(load, dies)
        self.base = ModelSpec.of(load()[0]).base
        self.results: list[TuneResult] = []
        self.events: list[Event] = []

    def __call__(self, users: dict[str, Any], **more: Any) -> Any:
        options: dict[str, Any] = {"base": self.base, "workers": 2, "slots": 2, "config": CONFIG}
        options |= {"on_result": self.results.append, "on_event": self.events.append} | more
        return tune_fleet(self.crew, METHOD, users, **options)


def same(results: list[TuneResult], load: Any, users: dict[str, Any]) -> None:
    """Each user once, with the prompt of one process."""
    assert Counter(result.name for result in results) == Counter(list(users))
    alone = tune_many(*load(), METHOD, users, config=CONFIG)
    for result in results:
        found, wanted = result.prompt.value.tensors(), alone[result.name].prompt.value.tensors()
        for key, tensor in wanted.items():
            # Sums of fp64 in other orders, stored in fp32: its last place at values around 1.
            assert (found[key] - tensor).abs().max() < 1e-6
        assert result.loss == pytest.approx(alone[result.name].loss, abs=1e-6)


def test_users_come_out_as_from_one_process(load: Any, users: dict[str, Any]) -> None:
    run = Run(load)
    done = run(users)
    same(run.results, load, users)
    assert set(done.finished) == set(users)
    assert done.failures == {}
    assert Counter(event.name for event in run.events if isinstance(event, Finished)) == Counter(list(users))
    assert Counter(event.name for event in run.events if isinstance(event, Started)) == Counter(list(users))
    assert run.crew.hired == 2


@pytest.mark.parametrize(("kind", "kept"), [(StepDone, True), (Shipment, True), (Shipment, False), (Ready, False)])
def test_a_death_costs_nobody(load: Any, users: dict[str, Any], tmp_path: Path, kind: type, kept: bool) -> None:
    """The second worker dies when it would say its third message of a kind (or first: `Ready`)."""
    said: Counter[int] = Counter()

    def dies(worker: int, message: Message) -> bool:
        said[worker] += isinstance(message, kind)
        return worker == 2 and said[2] == (1 if kind is Ready else 2)

    run = Run(load, dies)
    done = run(users, run_dir=tmp_path if kept else None)
    same(run.results, load, users)
    assert done.failures == {}
    assert run.crew.hired == 3
    assert not kept or list((tmp_path / "fleet").iterdir()) == []


def test_who_takes_over_goes_on_from_the_last_checkpoint(load: Any, users: dict[str, Any], tmp_path: Path) -> None:
    def dies(worker: int, message: Message) -> bool:
        return worker == 1 and isinstance(message, StepDone) and message.step == 4

    run = Run(load, dies)
    run(users, run_dir=tmp_path, workers=1)
    same(run.results, load, users)
    assert max(event.step for event in run.events if isinstance(event, Started)) in (2, 4)


def test_who_kills_workers_fails_alone(load: Any, users: dict[str, Any]) -> None:
    run = Run(load, lambda worker, message: isinstance(message, StepDone) and "blue" in message.losses)
    done = run(users)
    same(run.results, load, {name: rows for name, rows in users.items() if name != "blue"})
    assert set(done.failures) == {"blue"}
    assert isinstance(done.failures["blue"], FleetError)
    assert "3 workers" in done.failures["blue"].got
    assert [event.name for event in run.events if isinstance(event, Failed)] == ["blue"]


def test_workers_that_never_live_end_the_run(load: Any, users: dict[str, Any]) -> None:
    run = Run(load, lambda worker, message: isinstance(message, Ready))
    with pytest.raises(FleetError, match="6 that died before"):
        run(users)


def test_bad_rows_fail_their_user_alone(load: Any, users: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "torn.jsonl").write_text("{")
    long = [{"prompt": "ship " * 200, "completion": "x"}]
    run = Run(load)
    done = run({"torn": tmp_path / "torn.jsonl", **users, "long": long, "empty": []})
    same(run.results, load, users)
    assert {name: type(error) for name, error in done.failures.items()} == dict.fromkeys(
        ("torn", "long", "empty"), DataError
    )
    assert {event.name for event in run.events if isinstance(event, Failed)} == {"torn", "long", "empty"}


class _Unreadable:
    """Rows that the disk does not give."""

    def __iter__(self) -> Any:
        raise PermissionError(13, "Permission denied", "ada.jsonl")


def test_rows_that_cannot_be_read_fail_their_user_alone(load: Any, users: dict[str, Any]) -> None:
    """Oracle: `tune_many` in one process."""
    run = Run(load)
    done = run({"ada": _Unreadable(), **users})
    same(run.results, load, users)
    wanted = tune_many(*load(), METHOD, {"ada": _Unreadable()}, config=CONFIG).failures
    assert {name: str(error) for name, error in done.failures.items()} == {"ada": str(wanted["ada"])}


def test_only_bad_rows(load: Any) -> None:
    run = Run(load)
    assert set(run({"a": [], "b": []}).failures) == {"a", "b"}


def test_what_is_wrong_with_all_ends_the_run(load: Any, users: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="seq2seq"):
        Run(load)(users, task="seq2seq")


def test_another_model_on_a_worker_is_refused(load: Any, users: dict[str, Any]) -> None:
    run = Run(load)
    run.base = replace(run.base, digest="0" * 64)
    with pytest.raises(BaseMismatchError, match="same model"):
        run(users)


def test_a_stopped_driver_goes_on(load: Any, users: dict[str, Any], tmp_path: Path) -> None:
    first = Run(load)

    def stop(result: TuneResult) -> None:
        first.results.append(result)
        if len(first.results) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first(users, run_dir=tmp_path, on_result=stop)
    for worker in list(first.crew.workers):
        first.crew.kill(worker)  # they end with their driver
    done = {result.name for result in first.results}
    second = Run(load)
    second(users, run_dir=tmp_path, resume=True, done=done)
    same([*first.results, *second.results], load, users)


def test_who_is_not_done_is_tuned_again_whatever_a_checkpoint_says(
    load: Any, users: dict[str, Any], tmp_path: Path
) -> None:
    """As when prompts were deleted from the store between two runs."""
    first = Run(load)

    def stop(event: Event) -> None:
        if isinstance(event, StepDone) and first.results and event.step > 8:  # a checkpoint knows who was handed over
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first(users, run_dir=tmp_path, on_event=stop, workers=1, slots=1)
    for worker in list(first.crew.workers):
        first.crew.kill(worker)  # they end with their driver
    second = Run(load)
    second(users, run_dir=tmp_path, resume=True, done=set())
    same(second.results, load, users)
