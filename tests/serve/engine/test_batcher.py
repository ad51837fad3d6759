"""Jobs come, fail, are cancelled and make room for others. Oracle: the same job in an engine that has nothing else."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig, PreTrainedModel, T5Config, T5ForConditionalGeneration

from overture.errors import (
    BaseMismatchError,
    ConfigError,
    ContextLengthError,
    DataError,
    DivergedError,
    OvertureError,
    PromptFileError,
    UnknownPromptError,
    UnsupportedModelError,
)
from overture.prompt import KVPrefix, SoftPrompt
from overture.serve.engine import Batcher, EngineConfig
from overture.serve.engine.front import Front
from overture.serve.requests import Ended, Event, Piece, Sampling
from overture.spec import ModelSpec
from overture.store import PromptStore
from tests.exactness.conftest import build
from tests.serve.conftest import eventually, quick_folder
from tests.serve.engine.bench import GREEDY, TENANT, Answer, ask, job, make_prompts, make_tokenizer

LONG = replace(GREEDY, max_tokens=40)
Make = Callable[..., Batcher]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    model = build("llama")
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def prompts(model: PreTrainedModel) -> dict[str, SoftPrompt]:
    return make_prompts(ModelSpec.of(model))


@pytest.fixture
def store(prompts: dict[str, SoftPrompt]) -> Iterator[PromptStore]:
    with quick_folder() as folder, PromptStore(folder / "store") as store:
        for name in ("prefix5", "leading4"):
            store.publish(TENANT, name, prompts[name])
        yield store


@pytest.fixture
def make(model: PreTrainedModel, store: PromptStore) -> Iterator[Make]:
    made: list[Batcher] = []

    def batcher(**limits: Any) -> Batcher:
        made.append(Batcher(model, make_tokenizer(), store, EngineConfig(**limits)))
        return made[-1]

    yield batcher
    for one in made:
        one.close()


class Gate(Answer):
    """Holds the engine's thread at the first piece until it is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, event: Event) -> None:
        super().__call__(event)
        if isinstance(event, Piece) and not self.reached.is_set():
            self.reached.set()
            assert self.opened.wait(30)


@contextmanager
def held(batcher: Batcher, sampling: Sampling = LONG) -> Iterator[Gate]:
    """An engine that stands in the middle of an answer, so that what is sent meanwhile arrives together."""
    gate = Gate()
    batcher.submit(job("gate", "w3", sampling=sampling), gate)
    assert gate.reached.wait(30)
    try:
        yield gate
    finally:
        gate.opened.set()


def loaded(batcher: Batcher, count: int) -> None:
    """Wait until so many jobs stand before an engine that is held."""
    while len(batcher._messages) < count:
        threading.Event().wait(0.005)


def test_a_cancelled_job_ends_at_once_and_frees_its_row(make: Make) -> None:
    batcher = make(max_rows=1)
    with held(batcher) as first:
        waiting = Answer()
        batcher.submit(job("waiting", "w4"), waiting)
        batcher.cancel("gate")
        batcher.cancel("unknown")
    assert first.end().reason == "cancelled"
    assert first.end().completion_tokens == len(first.tokens) == 1
    assert waiting.end().reason == "length"
    assert eventually(lambda: batcher.stats().ended == {"cancelled": 1, "length": 1})


def test_a_job_can_be_cancelled_before_it_has_a_row(make: Make) -> None:
    batcher = make(max_rows=1)
    with held(batcher):
        queued, early = Answer(), Answer()
        batcher.submit(job("queued", "w4"), queued)
        batcher.submit(job("early", "w4"), early)
        batcher.cancel("early")
        batcher.cancel("queued")
    assert queued.end().reason == early.end().reason == "cancelled"
    assert [len(answer.events) for answer in (queued, early)] == [1, 1]


def test_a_job_that_fails_ends_alone(make: Make, store: PromptStore, prompts: dict[str, SoftPrompt]) -> None:
    prompt = prompts["prefix5"]
    store.publish(TENANT, "foreign", replace(prompt, base=replace(prompt.base, digest="0" * 64)))
    batcher = make()
    wrong: list[tuple[dict[str, Any], type[OvertureError]]] = [
        ({"item": "w4", "names": ("missing",)}, UnknownPromptError),
        ({"item": "w4", "names": ("foreign",)}, BaseMismatchError),
        ({"item": (3, 61)}, DataError),
        ({"item": ()}, DataError),
        ({"item": {"other": "w4"}}, DataError),
        ({"item": " ".join(["w4"] * 70)}, ContextLengthError),
        ({"item": "w4", "sampling": replace(GREEDY, top_p=0.0)}, ConfigError),
        ({"item": "w4", "sampling": replace(GREEDY, temperature=float("nan"))}, ConfigError),
        ({"item": "w4", "sampling": replace(GREEDY, max_tokens=0)}, ConfigError),
        ({"item": "w4", "sampling": replace(GREEDY, logit_bias={61: 1.0})}, ConfigError),
    ]
    jobs = [job(f"wrong {i}", **options) for i, (options, _) in enumerate(wrong)]
    *failed, good = ask(batcher, [*jobs, job("good", "w4", ("prefix5",))])
    for answer, (_, error) in zip(failed, wrong, strict=True):
        assert answer.end() == Ended("error", 0, 0, answer.end().error)
        assert type(answer.end().error) is error
    assert good.text == ask(make(), [job("good", "w4", ("prefix5",))])[0].text


def test_a_damaged_file_ends_its_jobs_alone(prompts: dict[str, SoftPrompt]) -> None:
    with quick_folder() as folder:
        with PromptStore(folder / "store") as store:
            record = store.publish(TENANT, "broken", prompts["prefix5"])
        for path in folder.rglob(f"{record.sha256}*"):
            path.write_bytes(path.read_bytes()[:-1])
        with PromptStore(folder / "store") as store:
            other = Batcher(build("llama"), make_tokenizer(), store)
            answer, good = ask(other, [job("broken", "w4", ("broken",)), job("good", "w4")])
            other.close()
    assert isinstance(answer.end().error, PromptFileError)
    assert good.end().reason != "error"


def test_a_failing_step_ends_the_rows_that_fail_and_no_others(
    make: Make, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [answer.text for answer in ask(make(), [job(str(i), f"w{5 + i}") for i in range(3)])]
    batcher = make()
    forward = model.forward

    def failing(*args: Any, **kwargs: Any) -> Any:
        if (kwargs["input_ids"] == 60).any():
            raise RuntimeError("a secret text")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", failing)
    with held(batcher) as gate:
        answers = [Answer() for _ in range(4)]
        for i, (answer, item) in enumerate(zip(answers, ("w5", "w60", "w6", "w7"), strict=True)):
            batcher.submit(job(str(i), item, sampling=replace(GREEDY, logit_bias={60: -100.0})), answer)
        loaded(batcher, 4)
    first, bad, *others = answers
    error = bad.end().error
    assert bad.end().reason == "error"
    assert error is not None
    assert "RuntimeError" in str(error)
    assert "secret" not in str(error)
    assert [answer.end().reason for answer in (first, *others)] == ["length"] * 3
    assert [answer.text for answer in (first, *others)] == wanted
    assert gate.end().reason in ("length", "error")


def test_numbers_that_are_none_end_their_row_and_reach_nobody_behind_it(make: Make, store: PromptStore) -> None:
    """A prefix of finite numbers whose sums are not; whoever gets its slot must not see what it left."""
    single = build("llama", dtype=torch.float32)
    spec = ModelSpec.of(single)
    shapes = [(layer.kv_heads, 5, layer.key_dim) for layer in spec.layers]
    keys, values = (tuple(torch.full(shape, number) for shape in shapes) for number in (0.0, 3e38))
    store.publish(TENANT, "huge", SoftPrompt(KVPrefix(keys, values), spec.base))
    batcher = Batcher(single, make_tokenizer(), store)
    (bad,) = ask(batcher, [job("bad", "w4 w5 w6 w7 w8 w9", ("huge",))])
    again = ask(batcher, [job(str(i), "w4") for i in range(3)])
    batcher.close()
    assert isinstance(bad.end().error, DivergedError)
    assert [answer.end().reason for answer in again] == ["length"] * 3
    assert len({answer.text for answer in again}) == 1


def test_what_a_row_of_numbers_left_reaches_nobody_behind_it() -> None:
    """In fp16 this prefix has an infinite key that its own text happens to shun, and others' would not."""
    half = build("llama", dtype=torch.float16)
    half.generation_config.eos_token_id = None
    spec = ModelSpec.of(half)
    shapes = [(layer.kv_heads, 5, layer.key_dim) for layer in spec.layers]
    keys, values = (tuple(torch.zeros(shape) for shape in shapes) for _ in range(2))
    keys[0][0, :, 3] = -1e6
    with quick_folder() as folder, PromptStore(folder / "store") as store:
        store.publish(TENANT, "infinite", SoftPrompt(KVPrefix(keys, values), spec.base))
        batcher = Batcher(half, make_tokenizer(), store, EngineConfig(loaders=1))
        (before,) = ask(batcher, [job("before", "w5", ("infinite",), replace(GREEDY, max_tokens=1))])
        behind = ask(batcher, [job("a", "w4"), job("b", " ".join(f"w{i}" for i in range(4, 20))), job("c", "w9")])
        batcher.close()
    assert before.end().reason == "length"
    assert [answer.end().reason for answer in behind] == ["length"] * 3


def test_a_row_that_cannot_be_admitted_ends_alone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    batcher = make()
    ready = batcher._prefixes.ready

    def short_of_memory(front: Front) -> KVPrefix | None:
        if front.prompts:
            raise torch.OutOfMemoryError("no room for a secret")
        return ready(front)

    monkeypatch.setattr(batcher._prefixes, "ready", short_of_memory)
    with held(batcher) as other:
        answer = Answer()
        batcher.submit(job("cold", "w5", ("leading4",)), answer)
        loaded(batcher, 1)
    assert answer.end().reason == "error"
    assert "secret" not in str(answer.end().error)
    assert other.end().reason == "length"


def test_a_broken_engine_ends_its_jobs_and_takes_no_more(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a device that is gone: whatever is asked of it fails, tidying up included."""
    batcher = make()

    def gone(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no device")

    with held(batcher) as first:
        assert batcher.alive
        waiting = Answer()
        batcher.submit(job("waiting", "w4"), waiting)
        loaded(batcher, 1)
        monkeypatch.setattr(batcher._core._stepper, "logits", gone)
        monkeypatch.setattr(batcher._core.planner.shelves, "leave", gone)
    assert [answer.end().reason for answer in (first, waiting)] == ["error", "error"]
    batcher._thread.join(30)
    assert not batcher.alive
    with pytest.raises(ConfigError, match="closed"):
        batcher.submit(job("late", "w4"), Answer())


def test_a_receiver_that_fails_loses_its_job_and_nothing_else(make: Make) -> None:
    batcher, other = make(), Answer()

    def receiver(event: Event) -> None:
        raise ConnectionError("gone")

    batcher.submit(job("gone", "w4", sampling=LONG), receiver)
    batcher.submit(job("other", "w5"), other)
    assert other.end().reason == "length"
    assert eventually(lambda: batcher.stats().ended == {"length": 1, "cancelled": 1})


def test_tenants_take_turns(make: Make) -> None:
    """One tenant has asked for six answers before another asks for one: that one does not wait for all six."""
    batcher, order = make(max_rows=1, loaders=1), []

    def noting(name: str, answer: Answer) -> Callable[[Event], None]:
        def deliver(event: Event) -> None:
            if isinstance(event, Ended):
                order.append(name)
            answer(event)

        return deliver

    answers = [Answer() for _ in range(7)]
    with held(batcher):
        for i in range(6):
            batcher.submit(job(f"many {i}", "w4", sampling=LONG, tenant="many"), noting("many", answers[i]))
        batcher.submit(job("one", "w5", sampling=LONG, tenant="one"), noting("one", answers[6]))
        loaded(batcher, 7)
        batcher.cancel("gate")
    for answer in answers:
        answer.end()
    # A turn is worth 64 tokens, and an answer here costs 42.
    assert order.index("one") <= 3


def test_tenants_take_turns_at_being_loaded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a text of megabytes takes seconds, and a tenant may send many at once."""
    batcher = make(loaders=1)
    load, order, opened = batcher._loader.load, [], threading.Event()

    def slow(job: Any, deliver: Any) -> Any:
        order.append(job.id)
        assert opened.wait(30)
        return load(job, deliver)

    monkeypatch.setattr(batcher._loader, "load", slow)
    answers = [Answer() for _ in range(4)]
    for id, answer in zip(("a1", "a2", "a3", "b1"), answers, strict=True):
        batcher.submit(job(id, "w4", tenant=id[0]), answer)
    opened.set()
    assert [answer.end().reason for answer in answers] == ["length"] * 4
    assert order.index("b1") < order.index("a3")


def test_rows_that_are_put_back_go_on_where_they_were(make: Make) -> None:
    """Room for three slots of 64 positions and nothing more, and answers that outgrow them."""
    position = 3 * 2 * 2 * 8 * 8  # layers, keys and values, heads, head size, fp64
    jobs = [
        job(str(i), " ".join(["w9"] * (30 + i)), sampling=Sampling(max_tokens=20, seed=i, logprobs=0)) for i in range(6)
    ]
    wanted = ask(make(), jobs)
    batcher = make(cache_bytes=3 * 64 * position)
    found = ask(batcher, jobs)
    assert [answer.text for answer in found] == [answer.text for answer in wanted]
    stats = batcher.stats()
    assert stats.cache_bytes <= stats.cache_budget


def test_a_long_text_stalls_nobody(make: Make) -> None:
    """Oracle: the steps. While sixty tokens are read in pieces of four, the other row gets a token at every step."""
    batcher = make(prefill_chunk=4)
    with held(batcher) as gate:
        long = Answer()
        batcher.submit(job("long", " ".join(["w9"] * 50), sampling=replace(GREEDY, max_tokens=1)), long)
        loaded(batcher, 1)
        before = batcher.stats().steps
    long.end()
    gate.end()
    assert batcher.stats().steps - before <= LONG.max_tokens + 1
    assert len(gate.tokens) == LONG.max_tokens


def test_a_prefix_that_rows_share_is_stored_once(make: Make, store: PromptStore, model: PreTrainedModel) -> None:
    """Oracle: what is in the slots. The first row has it to itself, when it comes; the others read it from beside."""
    spec = ModelSpec.of(model)
    shapes = [(layer.kv_heads, 40, layer.key_dim) for layer in spec.layers]
    prefix = KVPrefix(*(tuple(torch.randn(shape) for shape in shapes) for _ in range(2)))
    store.publish(TENANT, "long", SoftPrompt(prefix, spec.base))
    jobs = [job(str(i), f"w{5 + i} w6", ("long",)) for i in range(8)]
    texts, copies = [], []
    for share_from in (41, 40):
        batcher = make(share_from=share_from)
        answers = [Answer() for _ in jobs]
        seen: list[list[int]] = []

        def last(event: Event, batcher: Batcher = batcher, answer: Answer = answers[-1], seen: Any = seen) -> None:
            seen.append([row.held for row in batcher._core.planner.rows if row.prefix is not None])
            answer(event)

        with held(batcher):
            for one, answer in zip(jobs, [*answers[:-1], last], strict=True):
                batcher.submit(one, answer)
            loaded(batcher, len(jobs))
        texts.append([(answer.end(), answer.text)[1] for answer in answers])
        copies.append(sum(length > 0 for length in seen[0]))
    assert texts[0] == texts[1]
    assert copies == [8, 1]


def test_what_is_erased_from_the_store_leaves_the_engine(make: Make, store: PromptStore) -> None:
    batcher = make()
    gc.collect()
    gc.disable()  # what is erased goes at once, and not when garbage is collected some day
    try:
        ask(batcher, [job("before", "w4", ("leading4",)), job("base", "w4")])
        assert batcher.stats().prefixes.entries == 1
        store.erase(TENANT)
        # The engine's thread may still be leaving the step.
        assert eventually(lambda: batcher.stats().prefixes.entries == 0)
    finally:
        gc.enable()
    assert batcher.stats().prefixes.bytes == 0
    (after,) = ask(batcher, [job("after", "w4", ("leading4",))])
    assert isinstance(after.end().error, UnknownPromptError)


def test_an_answer_is_as_long_as_there_is_room(make: Make) -> None:
    (answer,) = ask(make(), [job("all", "w4 w5", ("prefix5",), replace(GREEDY, max_tokens=None))])
    # 64 positions: five virtual tokens, bos and two words.
    assert answer.end() == Ended("length", 3, 64 - 8)


def test_an_answer_ends_with_the_models_own_end(make: Make, store: PromptStore) -> None:
    model = build("llama")
    model.generation_config.eos_token_id = [2, 58]
    batcher = Batcher(model, make_tokenizer(), store)
    (answer,) = ask(batcher, [job("end", "w4", sampling=replace(GREEDY, logit_bias={58: 1000.0}))])
    batcher.close()
    assert answer.end() == Ended("stop", 2, 0)
    assert answer.events == [answer.end()]


def test_a_closed_engine_finishes_what_it_has_and_takes_no_more(make: Make) -> None:
    batcher, answer = make(), Answer()
    batcher.submit(job("last", "w4"), answer)
    batcher.close(drain=30)
    assert answer.end().reason == "length"
    with pytest.raises(ConfigError, match="closed"):
        batcher.submit(job("late", "w4"), Answer())


def test_closing_does_not_wait_longer_than_it_is_told(make: Make) -> None:
    batcher = make(max_rows=1)
    with held(batcher) as gate:
        closing = threading.Thread(target=batcher.close)
        closing.start()
    closing.join(30)
    assert not closing.is_alive()
    assert gate.end().reason in ("cancelled", "length")


def test_an_id_stands_for_one_job(make: Make) -> None:
    batcher = make()
    with held(batcher), pytest.raises(ConfigError, match="under way"):
        batcher.submit(job("gate", "w4"), Answer())


@pytest.mark.parametrize(
    ("option", "value"), [("max_rows", 0), ("cache_bytes", 0), ("prefill_chunk", 0), ("loaders", 0)]
)
def test_limits_that_no_engine_can_work_with_are_refused(option: str, value: int) -> None:
    with pytest.raises(ConfigError, match=option):
        EngineConfig(**{option: value})


def test_models_that_slots_cannot_hold_are_refused(store: PromptStore) -> None:
    recurrent = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    with pytest.raises(UnsupportedModelError):
        Batcher(recurrent, make_tokenizer(), store)
    flexible = build("llama")
    flexible.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedModelError, match="sdpa"):
        Batcher(flexible, make_tokenizer(), store)
    both = T5ForConditionalGeneration(T5Config(vocab_size=61, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(UnsupportedModelError, match="causal-lm"):
        Batcher(both, make_tokenizer(), store)
