"""Small models behind a Batcher, and the same request answered by transformers alone: the oracle."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from overture.prompt import KVPrefix, SoftPrompt, VirtualTokens
from overture.runtime.encode import encode
from overture.runtime.prompts import prompts
from overture.serve.engine import Batcher
from overture.serve.requests import Address, Ended, Event, Job, Piece, Sampling, Token
from overture.spec import ModelSpec
from overture.template import Template

VOCAB = 61
TENANT = "tenant"
GREEDY = Sampling(max_tokens=8, temperature=0.0, logprobs=2)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Every id from 3 is a word, `w3` to `w60`; a text begins with bos."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="w3"
    )


def make_prompts(spec: ModelSpec) -> dict[str, SoftPrompt]:
    """One prompt of every kind; numbers large enough that each changes the answer."""
    generator = torch.Generator().manual_seed(3)

    def prefix(length: int) -> KVPrefix:
        shapes = [(s.kv_heads, length, s.key_dim) for s in spec.layers]
        return KVPrefix(*(tuple(torch.randn(s, generator=generator) for s in shapes) for _ in range(2)))

    def tokens(length: int) -> VirtualTokens:
        return VirtualTokens(torch.randn(length, spec.hidden_size, generator=generator))

    inside = Template.parse("[V2] w5 {text} [V1] w6")
    leading = Template.parse("[V3] w7 {text} w8")
    values = {
        "prefix5": (prefix(5), None),
        "prefix2": (prefix(2), None),
        "leading4": (tokens(4), None),
        "leading9": (tokens(9), None),
        "leading3": (tokens(3), leading),
        "inside3": (tokens(3), inside),
    }
    return {name: SoftPrompt(value, spec.base, template, name=name) for name, (value, template) in values.items()}


@dataclass
class Answer:
    """What came back of one job."""

    events: list[Event] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event: Event) -> None:
        assert not self.over.is_set(), "an event behind the end"
        self.events.append(event)
        if isinstance(event, Ended):
            self.over.set()

    def end(self, timeout: float = 60) -> Ended:
        assert self.over.wait(timeout), "the job did not end"
        event = self.events[-1]
        assert isinstance(event, Ended)
        return event

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Piece))

    @property
    def tokens(self) -> list[Token]:
        return [token for event in self.events if isinstance(event, Piece) for token in event.tokens]


def job(id: str, item: object, names: Sequence[str] = (), sampling: Sampling = GREEDY, tenant: str = TENANT) -> Job:
    return Job(
        id=id,
        tenant=tenant,
        item=item,
        prompts=tuple(Address(tenant, name, 1) for name in names),
        sampling=sampling,
    )


def ask(batcher: Batcher, jobs: Sequence[Job]) -> list[Answer]:
    """Submit all jobs at once and wait for their ends."""
    answers = [Answer() for _ in jobs]
    for one, answer in zip(jobs, answers, strict=True):
        batcher.submit(one, answer)
    for answer in answers:
        answer.end()
    return answers


@torch.no_grad()
def alone(
    model: PreTrainedModel, tokenizer: Any, row: Sequence[SoftPrompt], item: Any, length: int
) -> tuple[list[int], Tensor]:
    """The ids that transformers' own `generate` gives for one request, and the log-probabilities at each of them.

    `generate` rounds logits to fp32, so the log-probabilities come of one pass over text and answer.
    """
    chosen = tuple(row) if len(row) > 1 else row[0] if row else None
    batch = encode(tokenizer, [item], [chosen], spec=ModelSpec.of(model))
    given = batch.input_ids.shape[1]
    with prompts(model, [chosen], batch):
        out: Any = model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=length,
            do_sample=False,
            pad_token_id=0,
        )
        logits = model(input_ids=out, use_cache=False).logits[0, given - 1 : -1]
    return out[0, given:].tolist(), logits.log_softmax(-1)
