"""Cold prompts of virtual tokens are read in the steps of others. Oracles: the tokens and passes that the model sees,
and the same job in an engine that has nothing else.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from overture.prompt import SoftPrompt, VirtualTokens
from overture.serve.engine import Batcher, EngineConfig, cache
from overture.serve.engine.front import Compilation
from overture.serve.requests import Ended, Event, Sampling
from overture.spec import ModelSpec
from overture.store import PromptStore
from tests.exactness.conftest import build
from tests.serve.conftest import quick_folder
from tests.serve.engine.bench import GREEDY, TENANT, Answer, ask, job, make_tokenizer
from tests.serve.engine.test_batcher import held, loaded

USERS, LENGTH, MEDIUM, LONGER = 8, 6, 16, 20
POSITION = 3 * 2 * 2 * 8 * 8
"""Bytes: layers, keys and values, heads, head size, fp64."""


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    model = build("llama")
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def store(model: PreTrainedModel) -> Iterator[PromptStore]:
    spec, generator = ModelSpec.of(model), torch.Generator().manual_seed(7)
    with quick_folder() as folder, PromptStore(folder / "store") as store:
        lengths = {f"user{user}": LENGTH for user in range(USERS)} | {"medium": MEDIUM, "long": LONGER}
        for name, length in lengths.items():
            tokens = VirtualTokens(torch.randn(length, spec.hidden_size, generator=generator))
            store.publish(TENANT, name, SoftPrompt(tokens, spec.base))
        yield store


@pytest.fixture
def passes(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The ids of every pass of the model from now on; those of virtual tokens are 0, which no text here has."""
    forward, seen = model.model.forward, []

    def noting(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["input_ids"].clone())
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", noting)
    return seen


def virtual(passes: list[torch.Tensor]) -> list[int]:
    return [count for ids in passes if (count := int((ids == 0).sum()))]


def beside_another(batcher: Batcher, names: list[str], passes: list[torch.Tensor]) -> list[str]:
    """Ask under prompts that nobody has used yet while another answer is written; the texts."""
    answers = [Answer() for _ in names]
    with held(batcher):
        for number, (name, answer) in enumerate(zip(names, answers, strict=True)):
            batcher.submit(job(str(number), f"w{5 + number} w6", (name,)), answer)
        loaded(batcher, len(names))
        passes.clear()
    assert [answer.end().reason for answer in answers] == ["length"] * len(names)
    return [answer.text for answer in answers]


def wanted(model: PreTrainedModel, store: PromptStore, names: list[str]) -> list[str]:
    batcher = Batcher(model, make_tokenizer(), store, EngineConfig(max_rows=1))
    texts = [ask(batcher, [job("alone", f"w{5 + i} w6", (name,))])[0].text for i, name in enumerate(names)]
    batcher.close()
    return texts


def test_cold_prompts_are_read_together_in_the_steps_of_others(
    model: PreTrainedModel, store: PromptStore, passes: list[torch.Tensor]
) -> None:
    names = [f"user{user}" for user in range(USERS)]
    expected = wanted(model, store, names)
    batcher = Batcher(model, make_tokenizer(), store)
    before = batcher.stats().steps
    assert beside_another(batcher, names, passes) == expected
    batcher.close()
    assert virtual(passes) == [USERS * LENGTH]
    # No pass between the steps, and every one of them goes on with the answer under way.
    assert len(passes) <= batcher.stats().steps - before
    assert all((ids != 0).any() for ids in passes)


def test_a_cold_prompt_is_read_once_for_all_who_wait_for_it(
    model: PreTrainedModel, store: PromptStore, passes: list[torch.Tensor]
) -> None:
    batcher = Batcher(model, make_tokenizer(), store)
    beside_another(batcher, ["user0"] * 6 + ["user1"] * 2, passes)
    batcher.close()
    assert virtual(passes) == [2 * LENGTH]


@pytest.mark.parametrize("limits", [{"prefix_bytes": 0}, {"prefill_chunk": 4}, {"max_rows": 2}, {"cache_bytes": 1}])
def test_little_room_changes_no_answer(
    model: PreTrainedModel, store: PromptStore, passes: list[torch.Tensor], limits: dict[str, int]
) -> None:
    if "cache_bytes" in limits:
        limits = {"cache_bytes": 2 * 64 * POSITION}  # slots for two lines
    names = [f"user{user % 4}" for user in range(USERS)]
    expected = wanted(model, store, names)  # first: two engines must not run one model at a time
    batcher = Batcher(model, make_tokenizer(), store, EngineConfig(**limits))
    assert beside_another(batcher, names, passes) == expected
    batcher.close()


@pytest.mark.parametrize(("kept", "read"), [(LENGTH, [LENGTH]), (LENGTH - 1, [])])
def test_who_is_next_finds_the_prompt_warm(
    model: PreTrainedModel, store: PromptStore, passes: list[torch.Tensor], kept: int, read: list[int]
) -> None:
    """While the only row is taken, the prompt of the one who has it next is read, and no more than can be kept."""
    batcher = Batcher(model, make_tokenizer(), store, EngineConfig(max_rows=1, prefix_bytes=kept * POSITION))
    with held(batcher) as gate:
        waiting = [Answer() for _ in range(3)]
        for number, answer in enumerate(waiting):
            batcher.submit(job(str(number), "w5", (f"user{number}",)), answer)
        loaded(batcher, 3)
        passes.clear()
    assert virtual(passes[: gate.end().completion_tokens - 1]) == read
    assert [answer.end().reason for answer in waiting] == ["length"] * 3
    batcher.close()


def test_a_cold_prompt_that_cannot_be_read_ends_its_own_rows(
    model: PreTrainedModel, store: PromptStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["user0", "user1", "user0"]
    expected = wanted(model, store, names)
    batcher = Batcher(model, make_tokenizer(), store)
    bad = store.get(TENANT, "user0").value
    assert isinstance(bad, VirtualTokens)
    logits = batcher._core._stepper.logits

    def failing(lines: Any, groups: Any) -> Any:
        if any(line.virtual is not None and torch.equal(line.virtual.embeddings, bad.embeddings) for line, _ in lines):
            raise RuntimeError("a secret")
        return logits(lines, groups)

    monkeypatch.setattr(batcher._core._stepper, "logits", failing)
    with held(batcher) as other:
        answers = [Answer() for _ in names]
        for number, (name, answer) in enumerate(zip(names, answers, strict=True)):
            batcher.submit(job(str(number), f"w{5 + number} w6", (name,)), answer)
        loaded(batcher, len(names))
    assert [answer.end().reason for answer in answers] == ["error", "length", "error"]
    assert "secret" not in str(answers[0].end().error)
    assert answers[1].text == expected[1]
    assert other.end().reason == "length"
    monkeypatch.undo()
    (again,) = ask(batcher, [job("again", "w5 w6", ("user0",))])
    assert again.text == expected[0]
    batcher.close()


def test_a_job_can_be_cancelled_while_its_prompt_is_read(
    model: PreTrainedModel, store: PromptStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    batcher = Batcher(model, make_tokenizer(), store, EngineConfig(prefill_chunk=1))
    logits = batcher._core._stepper.logits

    def cancelling(lines: Any, groups: Any) -> Any:
        if batcher._core.planner.compiling:
            batcher.cancel("waiting")
        return logits(lines, groups)

    monkeypatch.setattr(batcher._core._stepper, "logits", cancelling)
    with held(batcher) as other:
        waiting = Answer()
        batcher.submit(job("waiting", "w5", ("user3",), replace(GREEDY, max_tokens=2)), waiting)
        loaded(batcher, 1)
    assert waiting.end().reason == "cancelled"
    other.end()
    (again,) = ask(batcher, [job("again", "w5", ("user3",), replace(GREEDY, max_tokens=2))])
    assert again.end().reason == "length"
    batcher.close()
    assert not batcher._core.planner.compiling
    assert not any(shelf.rows for shelf in batcher._core.planner.shelves.shelves.values())


def test_others_write_on_while_a_cold_prompt_is_loaded(
    model: PreTrainedModel, store: PromptStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that does not answer before another job, which came later, has ended."""
    get, opened = store.get, threading.Event()

    def slow(*args: Any, **kwargs: Any) -> SoftPrompt:
        if args[1] == "user4":
            assert opened.wait(30)
        return get(*args, **kwargs)

    monkeypatch.setattr(store, "get", slow)
    batcher = Batcher(model, make_tokenizer(), store)
    cold = Answer()
    batcher.submit(job("cold", "w5", ("user4",)), cold)
    (other,) = ask(batcher, [job("other", "w5", ("user5",))])
    assert other.end().reason == "length"
    assert not cold.events
    opened.set()
    assert cold.end().reason == "length"
    batcher.close()


def test_a_cold_prompt_that_cannot_be_kept_ends_its_own_rows(
    model: PreTrainedModel, store: PromptStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for want of memory, after the step in which it was read to its end beside others."""
    names = ["user0", "user1", "user0"]
    expected = wanted(model, store, names)
    batcher = Batcher(model, make_tokenizer(), store)
    bad, finish = store.get(TENANT, "user0"), batcher._prefixes.finish

    def failing(compilation: Compilation) -> None:
        if compilation.prompt is bad:
            raise torch.OutOfMemoryError("a secret")
        finish(compilation)

    monkeypatch.setattr(batcher._prefixes, "finish", failing)
    with held(batcher) as other:
        answers = [Answer() for _ in names]
        for number, (name, answer) in enumerate(zip(names, answers, strict=True)):
            batcher.submit(job(str(number), f"w{5 + number} w6", (name,)), answer)
        loaded(batcher, len(names))
    assert [answer.end().reason for answer in answers] == ["error", "length", "error"]
    assert "secret" not in str(answers[0].end().error)
    assert answers[1].text == expected[1]
    assert other.end().reason == "length"
    batcher.close()
    assert not any(shelf.rows for shelf in batcher._core.planner.shelves.shelves.values())


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots of 16 positions, and of as many more as there is memory for."""
    monkeypatch.setattr(cache, "_SMALLEST", 16)


def short(length: int) -> Sampling:
    return replace(GREEDY, max_tokens=length)


@pytest.mark.usefixtures("narrow")
def test_a_cold_prompt_waits_for_memory_in_turn(model: PreTrainedModel, store: PromptStore) -> None:
    """It needs two of four slots, and others, who need one, come and go one by one: it is not last."""
    order: list[str] = []

    def noting(name: str, answer: Answer) -> Callable[[Event], None]:
        def deliver(event: Event) -> None:
            if isinstance(event, Ended):
                order.append(name)
            answer(event)

        return deliver

    lengths = {"a": 4, "b": 6, "c": 8, "cold": 2} | {str(number): 8 for number in range(12)}
    answers = {name: Answer() for name in lengths}
    batcher = Batcher(model, make_tokenizer(), store, EngineConfig(cache_bytes=64 * POSITION))
    with held(batcher, short(2)):
        for sent, (name, length) in enumerate(lengths.items(), 1):
            prompts = ("long",) if name == "cold" else ()
            batcher.submit(job(name, "w5", prompts, short(length)), noting(name, answers[name]))
            loaded(batcher, sent)  # loaders race, and a turn is that of the loaded
    assert [answer.end().reason for answer in answers.values()] == ["length"] * len(lengths)
    batcher.close()
    assert order.index("cold") <= 3


@pytest.mark.usefixtures("narrow")
def test_who_is_next_takes_no_memory_that_another_waits_for(
    model: PreTrainedModel, store: PromptStore, passes: list[torch.Tensor]
) -> None:
    text = " ".join(["w7"] * 20)
    batcher = Batcher(model, make_tokenizer(), store, EngineConfig(cache_bytes=48 * POSITION, loaders=1))
    with held(batcher, short(10)):
        answers = [Answer() for _ in range(3)]
        for answer, one in zip(
            answers, (job("0", "w5", sampling=short(10)), job("1", text), job("2", "w5", ("user0",))), strict=True
        ):
            batcher.submit(one, answer)
            loaded(batcher, int(one.id) + 1)
        passes.clear()
    assert [answer.end().reason for answer in answers] == ["length"] * 3
    batcher.close()
    begun = next(i for i, ids in enumerate(passes) if int((ids == 7).sum()) > 1)
    assert virtual(passes[:begun]) == []
    assert virtual(passes) == [LENGTH]


@pytest.mark.usefixtures("narrow")
def test_no_answer_makes_room_for_a_cold_prompt(
    model: PreTrainedModel, store: PromptStore, passes: list[torch.Tensor]
) -> None:
    """An answer outgrows its slot while the last free memory is a cold prompt's."""
    expected = wanted(model, store, ["medium"])
    batcher = Batcher(model, make_tokenizer(), store, EngineConfig(cache_bytes=56 * POSITION, prefill_chunk=1))
    with held(batcher, short(20)) as other:
        answer = Answer()
        batcher.submit(job("cold", "w5 w6", ("medium",)), answer)
        loaded(batcher, 1)
        passes.clear()
    assert [other.end().reason, answer.end().reason] == ["length"] * 2
    batcher.close()
    assert answer.text == expected[0]
    assert sum(virtual(passes)) > MEDIUM
    assert batcher.stats().preemptions == 0
