"""No user's answer depends on another: a differential test over many tenants' prompts.

Oracle: the same request alone, in an engine that holds one row and has room for everything (`test_exact.py` compares
that with transformers). Tokens, texts and reasons must be equal, log-probabilities within 1e-9: fp64, whose rounding
(which depends on the batch) is a thousand times smaller and flips no draw.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from overture.errors import UnknownPromptError
from overture.prompt import KVPrefix, SoftPrompt, VirtualTokens
from overture.serve.engine import Batcher, EngineConfig, EngineStats
from overture.serve.requests import Address, Ended, Event, Job, Piece, Sampling
from overture.spec import ModelSpec
from overture.store import PromptStore
from overture.template import Template
from tests.serve.conftest import quick_folder
from tests.serve.engine.bench import VOCAB, Answer, make_tokenizer

LOGPROB = 1e-9
TENANTS, PROMPTS = 40, 240
IN_FLIGHT = 48


@dataclass(frozen=True)
class Request:
    tenant: str
    prompts: tuple[Address, ...]
    item: object
    sampling: Sampling

    def job(self, id: str) -> Job:
        return Job(id=id, tenant=self.tenant, item=self.item, prompts=self.prompts, sampling=self.sampling)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        max_position_embeddings=96,
        initializer_range=0.4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def store(model: PreTrainedModel) -> Iterator[PromptStore]:
    spec, generator = ModelSpec.of(model), torch.Generator().manual_seed(1)

    def value(kind: int, length: int) -> KVPrefix | VirtualTokens:
        if kind:
            return VirtualTokens(torch.randn(length, spec.hidden_size, generator=generator))
        shapes = [(layer.kv_heads, length, layer.key_dim) for layer in spec.layers]
        return KVPrefix(*(tuple(torch.randn(s, generator=generator) for s in shapes) for _ in range(2)))

    with quick_folder() as folder, PromptStore(folder / "store", memory=20_000) as store:
        for number in range(PROMPTS):
            length, kind = 1 + number % 13, number % 3
            template = Template.parse(f"[V{length}] w3 {{text}} [V1] w4") if kind == 2 else None
            prompt = SoftPrompt(value(kind, length + (kind == 2)), spec.base, template, name=f"p{number}")
            store.publish(f"tenant {number % TENANTS}", f"p{number // TENANTS}", prompt)
        yield store


def make_requests(count: int, seed: int) -> list[Request]:
    """Requests of all kinds, some of which cannot be answered."""
    draw = random.Random(seed)
    requests = []
    for _ in range(count):
        tenant = draw.randrange(TENANTS)
        own = [f"p{i}" for i in range(PROMPTS // TENANTS)]
        # Numbers 0, 3, ... are prefixes, 1, 4, ... lead the text; only these can be joined.
        leading = [name for i, name in enumerate(own) if (i * TENANTS + tenant) % 3 != 2]
        names = draw.choice([[], [draw.choice(own)], [draw.choice(own)], draw.sample(leading, 2)])
        version = 2 if names and draw.random() < 0.02 else 1
        greedy = draw.random() < 0.3
        sampling = Sampling(
            max_tokens=draw.randint(1, 7),
            temperature=0.0 if greedy else draw.choice([0.5, 1.0, 2.0]),
            top_p=draw.choice([1.0, 0.9, 0.4]),
            top_k=draw.choice([0, 5]),
            seed=draw.randrange(1000),
            stop=draw.choice([(), (), ("w9 w1", "w33")]),
            logprobs=draw.choice([None, 0, 3]),
            logit_bias=draw.choice([{}, {7: 2.0, 2: -3.0}]),
            presence_penalty=draw.choice([0.0, 0.0, 1.5]),
            frequency_penalty=draw.choice([0.0, 0.0, 0.7]),
        )
        text = " ".join(f"w{draw.randint(3, VOCAB - 1)}" for _ in range(draw.choice([1, 2, 5, 9, 40, 56])))
        addresses = tuple(Address(f"tenant {tenant}", name, version) for name in names)
        requests.append(Request(f"tenant {tenant}", addresses, text, sampling))
    return requests


class Crowd:
    """Keeps an engine full, and hangs up on some answers."""

    def __init__(self, batcher: Batcher, seed: int) -> None:
        self.batcher, self.draw = batcher, random.Random(seed)
        self.room = threading.Semaphore(IN_FLIGHT)

    def ask(self, requests: Sequence[Request]) -> list[tuple[Answer, bool]]:
        asked = []
        for number, request in enumerate(requests):
            answer, quits = Answer(), self.draw.choice([None] * 20 + [0, 1, 2])
            self.room.acquire()
            self.batcher.submit(request.job(str(number)), self._deliver(str(number), answer, quits))
            if quits == 0:
                self.batcher.cancel(str(number))
            asked.append((answer, quits is not None))
        for answer, _ in asked:
            answer.end()
        return asked

    def _deliver(self, id: str, answer: Answer, quits: int | None):  # type: ignore[no-untyped-def]
        def deliver(event: Event) -> None:
            answer(event)
            if isinstance(event, Ended):
                self.room.release()
            elif quits and sum(isinstance(e, Piece) for e in answer.events) == quits:
                self.batcher.cancel(id)

        return deliver


def same(answer: Answer, wanted: Answer, *, hung_up: bool) -> bool:
    """Whether an answer is what it is alone; one that was hung up on may end early, but not differ."""
    end, expected = answer.end(), wanted.end()
    if end.reason != "cancelled":
        whole = (answer.text, end.reason, end.prompt_tokens, end.completion_tokens, type(end.error))
        if whole != (
            wanted.text,
            expected.reason,
            expected.prompt_tokens,
            expected.completion_tokens,
            type(expected.error),
        ):
            return False
        if len(answer.tokens) != len(wanted.tokens):
            return False
    elif not hung_up or not wanted.text.startswith(answer.text):
        return False
    return all(
        one.id == other.id
        and [a.id for a in one.alternatives] == [a.id for a in other.alternatives]
        and (one.logprob is None) == (other.logprob is None)
        and (one.logprob is None or abs(one.logprob - other.logprob) <= LOGPROB)
        for one, other in zip(answer.tokens, wanted.tokens, strict=False)
    )


def fuzz(model: PreTrainedModel, store: PromptStore, distinct: int, count: int) -> EngineStats:
    tokenizer = make_tokenizer()
    requests = make_requests(distinct, seed=5)
    alone = Batcher(model, tokenizer, store, EngineConfig(max_rows=1, loaders=1))
    wanted = []
    for number, request in enumerate(requests):
        wanted.append(Answer())
        alone.submit(request.job(str(number)), wanted[-1])
    for answer in wanted:
        answer.end(120)
    alone.close()
    # Little of everything: rows are put back, prompts are evicted, long texts are read in pieces, prefixes are shared.
    position = 2 * 2 * 8 * 8  # layers, keys and values, head size, fp64
    config = EngineConfig(
        max_rows=24, cache_bytes=450 * position, prefix_bytes=20_000, prefill_chunk=40, share_from=6, loaders=3
    )
    batcher = Batcher(model, tokenizer, store, config)
    draw = random.Random(6)
    order = [draw.randrange(distinct) for _ in range(count)]
    answers = Crowd(batcher, seed=7).ask([requests[i] for i in order])
    batcher.close()
    stats = batcher.stats()  # when it is closed: an answer ends before the engine has counted it
    wrong = [
        (requests[i], answer)
        for i, (answer, hung_up) in zip(order, answers, strict=True)
        if not same(answer, wanted[i], hung_up=hung_up)
    ]
    assert not wrong, f"{len(wrong)} of {count} answers differ, the first: {wrong[0]}"
    # The test means something: everything that could interfere has happened.
    assert stats.prefixes.evictions > 0
    errors = {type(answer.end().error) for answer in wanted if answer.end().error is not None}
    assert errors == {UnknownPromptError}
    assert len({answer.text for answer in wanted}) > distinct // 3
    assert (stats.running, stats.waiting, stats.loading) == (0, 0, 0)
    return stats


def test_no_answer_depends_on_others(model: PreTrainedModel, store: PromptStore) -> None:
    ended = Counter(fuzz(model, store, distinct=60, count=500).ended)
    assert min(ended[reason] for reason in ("stop", "length", "cancelled", "error")) > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_answer_of_ten_thousand_depends_on_others(model: PreTrainedModel, store: PromptStore) -> None:
    stats = fuzz(model, store, distinct=300, count=10_000)
    assert sum(stats.ended.values()) == 10_000
    assert stats.preemptions > 0  # where there are few requests, it depends on their timing
