"""The features of the matrix: what is done with a model under its prompts, and what must come out.

A feature runs a batch of rows through Overture and compares each with the plain model reading that row's words
(`bench.py` says how). The first line of a feature's docstring is its line in docs/compatibility.md.

Tolerances. In fp64, 1e-9 on logits of order 1 to 10: a few hundred roundings of 1e-16 with room, while a misplaced
position or a missing mask moves them by more than 0.01. Modeling code that computes in fp32 whatever its weights are
(routers, rotary angles of shifted positions, scans) is held to 2e-4, some hundred roundings of 1e-7 times the logits'
size. `generate` hands out its logits in fp32: 2e-5. Gradients are compared relative to their largest value.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from overture.methods import DeepPrompt, PrefixTuning, PromptTuning, PTuning
from overture.runtime.compile import Frozen
from overture.runtime.prompts import prompts
from overture.tuning.api import fold
from tests.matrix.bench import Bench, Row
from tests.matrix.families import VOCAB, Family

__all__ = ["FEATURES", "Feature", "Measure", "Words"]

NEW = 6
"""Tokens to generate: as many as the sliding window, so that texts leave it."""


class Measure:
    """Compares, and remembers the largest deviation."""

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self.largest = 0.0

    def close(self, got: Tensor, wanted: Tensor, *, at_least: float = 0.0) -> None:
        """`got` is `wanted` within the family's tolerance, or the wider one given."""
        allowed = max(self.tolerance, at_least)
        deviation = float((got.detach().double() - wanted.detach().double()).abs().max())
        assert deviation <= allowed, f"off by {deviation:.1e}, more than {allowed:.0e}"
        self.largest = max(self.largest, deviation)


Check = Callable[[Bench, Sequence[Row], Measure], None]


@dataclass(frozen=True, slots=True)
class Feature:
    """A column of the matrix."""

    name: str
    kinds: tuple[str, ...]
    """Kinds of families that it applies to."""
    rows: str
    """`mixed` rows, or rows of one kind."""
    check: Check
    sliding: bool = False
    """It applies only to families with sliding windows."""
    bare: str = "none"
    """Rows that show whether the model itself can: without a prompt, or, for a gradient, with tokens in the input."""

    @property
    def slug(self) -> str:
        """The name as part of a test's id."""
        return self.name.lower().replace(" ", "-")

    @property
    def oracle(self) -> str:
        """What it is compared with, in a line."""
        return (self.check.__doc__ or "").split("\n")[0]

    def applies_to(self, family: Family) -> bool:
        """True if the feature means something for the family."""
        return family.kind in self.kinds and (family.sliding or not self.sliding)


FEATURES: list[Feature] = []
ALL = ("decoder", "encoder")
DECODERS = ("decoder",)


def _feature(name: str, kinds: tuple[str, ...] = ALL, rows: str = "mixed", **options: Any) -> Callable[[Check], Check]:
    def add(check: Check) -> Check:
        FEATURES.append(Feature(name, kinds, rows, check, **options))
        return check

    return add


# Forward and backward


@_feature("Deep prompts", rows="deep")
@_feature("Virtual tokens inside the text", rows="inside")
@_feature("Leading virtual tokens", rows="leading")
@_feature("KV prefix", rows="prefix")
def one_kind(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """The plain model reading the words of each row alone; P = 1, 7, 33 and no prompt in one batch, either padding."""
    for side in ("right", "left"):
        _forward(bench, rows, measure, side)


@_feature("Mixed rows, right padding")
def right_padded(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """The plain model reading the words of each row alone; all kinds of prompts, and none, in one batch."""
    _forward(bench, rows, measure, "right")


@_feature("Mixed rows, left padding")
def left_padded(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """The plain model reading the words of each row alone."""
    _forward(bench, rows, measure, "left")


def _forward(
    bench: Bench,
    rows: Sequence[Row],
    measure: Measure,
    side: str,
    model: PreTrainedModel | None = None,
    **options: Any,
) -> None:
    batch, model = bench.batch(rows, side), bench.model if model is None else model
    with torch.no_grad(), prompts(model, bench.values(rows), batch.encoded, **options):
        logits = model(**batch.inputs).logits
    for number, row in enumerate(rows):
        measure.close(logits[number, batch.places[number]], bench.said(row))


@_feature("Gradients", bare="inside")
def gradients(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """Autograd through the plain model, to the words' embeddings, for every kind of prompt in one batch."""
    for got, wanted in zip(_gradients(bench, rows, bench.model), _plain_gradients(bench, rows), strict=True):
        _same_gradient(got, wanted, measure)


def _same_gradient(got: Tensor, wanted: Tensor, measure: Measure) -> None:
    scale = wanted.abs().max()
    assert scale > 0, "a gradient of zero shows nothing"
    # Norms and rotary angles are fp32 in these models, and sums run in another order.
    measure.close(got / scale, wanted / scale, at_least=1e-5)


def _leaves(bench: Bench, rows: Sequence[Row]) -> list[Tensor]:
    return [bench.embedded(row.words).requires_grad_() for row in rows]


def _loss(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1)[:, 3:9].square().mean()


def _gradients(bench: Bench, rows: Sequence[Row], model: PreTrainedModel) -> list[Tensor]:
    """The gradient of a loss over the batch at each row's words."""
    leaves, batch = _leaves(bench, rows), bench.batch(rows, "right")
    values = [bench.value(row, leaf) for row, leaf in zip(rows, leaves, strict=True)]
    with prompts(model, values, batch.encoded):
        logits = model(**batch.inputs, use_cache=False).logits
    sum(_loss(logits[number, place]) for number, place in enumerate(batch.places)).backward()
    return [leaf.grad for row, leaf in zip(rows, leaves, strict=True) if row.kind != "none"]


def _plain_gradients(bench: Bench, rows: Sequence[Row]) -> list[Tensor]:
    leaves = _leaves(bench, rows)
    sum(_loss(bench.plain(row, leaf)) for row, leaf in zip(rows, leaves, strict=True)).backward()
    return [leaf.grad for row, leaf in zip(rows, leaves, strict=True) if row.kind != "none"]


@_feature("Gradient checkpointing", bare="inside")
def checkpointing(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """As Gradients, with transformers' own switch on, not reentrant."""
    _checkpointed(bench, rows, measure, reentrant=False)


@_feature("Reentrant checkpointing", bare="inside")
def reentrant_checkpointing(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """As Gradients, with transformers' own switch on and `use_reentrant=True`."""
    _checkpointed(bench, rows, measure, reentrant=True)


def _checkpointed(bench: Bench, rows: Sequence[Row], measure: Measure, *, reentrant: bool) -> None:
    model = bench.family.build(bench.model.dtype)
    # transformers 5.23 renamed the switch.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for got, wanted in zip(_gradients(bench, rows, model), _plain_gradients(bench, rows), strict=True):
        _same_gradient(got, wanted, measure)


@_feature("Methods started from words")
def methods(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """Each method's module, started from words and folded, is those words; parameters are fp32: 1e-3."""
    made = {"prefix": PrefixTuning, "deep": DeepPrompt, "leading": PromptTuning, "inside": PTuning}
    for row in rows:
        if row.kind == "none":
            continue
        module = made[row.kind](init="words").build(Frozen(bench.model, Words(row.words)), Generator().manual_seed(0))
        batch = bench.batch([row], "right")
        with torch.no_grad(), prompts(bench.model, [fold(bench.model, module())], batch.encoded):
            logits = bench.model(**batch.inputs).logits[0, batch.places[0]]
        measure.close(logits, bench.said(row), at_least=1e-3)


class Words:
    """A tokenizer that knows one text."""

    def __init__(self, words: Tensor) -> None:
        self.words = words

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return self.words.tolist()


# Generation


def _generate(bench: Bench, rows: Sequence[Row], measure: Measure, new: int = NEW, **options: Any) -> Any:
    """Greedy answers to a left-padded batch, each compared with the plain model's, token by token and in logits."""
    batch = bench.batch(rows, "left")
    with prompts(bench.model, bench.values(rows), batch.encoded):
        out = bench.model.generate(**batch.inputs, **_GREEDY, max_new_tokens=new, **options)
    _answers(bench, rows, out, out.sequences[:, batch.width :], measure)
    return out


_GREEDY: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def _answers(bench: Bench, rows: Sequence[Row], out: Any, new: Tensor, measure: Measure) -> None:
    for number, row in enumerate(rows):
        wanted = bench.greedy(row, new.shape[1])
        assert new[number].tolist() == wanted.tolist(), f"row {number}, {row.kind}"
        logits = bench.plain(row.longer(wanted[:-1]))[-len(wanted) :]
        measure.close(torch.stack(out.logits)[:, number], logits, at_least=2e-5)


@_feature("Greedy", DECODERS)
def greedy(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """The plain model's most likely tokens, computed without a cache."""
    _generate(bench, rows, measure)


@_feature("Sampling with a seed", DECODERS)
def sampling(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """The plain model's probabilities, drawn from with the same seed."""
    _sampled(bench, rows, measure, copies=1)


@_feature("num_return_sequences", DECODERS)
def return_sequences(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """As Sampling, three of each row."""
    _sampled(bench, rows, measure, copies=3)


def _sampled(bench: Bench, rows: Sequence[Row], measure: Measure, copies: int) -> None:
    batch = bench.batch(rows, "left")
    options = {"do_sample": True, "top_k": 0, "num_return_sequences": copies, "max_new_tokens": NEW}
    torch.manual_seed(7)
    with prompts(bench.model, bench.values(rows), batch.encoded):
        out = bench.model.generate(**batch.inputs, **_GREEDY | options)
    torch.manual_seed(7)
    repeated = [row for row in rows for _ in range(copies)]
    for step in range(NEW):
        wanted = torch.stack([bench.plain(row)[-1] for row in repeated])
        measure.close(out.logits[step], wanted, at_least=2e-5)
        drawn = torch.multinomial(wanted.float().softmax(-1), 1)
        repeated = [row.longer(token) for row, token in zip(repeated, drawn, strict=True)]
    got = out.sequences[:, batch.width :]
    assert got.tolist() == [row.text[-NEW:].tolist() for row in repeated]


@_feature("Beams", DECODERS)
def beams(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """The plain model's own beam search over the row alone, two of three beams returned, in tokens and scores.

    The plain hybrid finds a prefix in its cache, from where its own search would not start: there it is the row alone.
    """
    options = _GREEDY | {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": NEW, "output_scores": True}
    batch = bench.batch(rows, "left")
    with prompts(bench.model, bench.values(rows), batch.encoded):
        out = bench.model.generate(**batch.inputs, **options)
    for number, row in enumerate(rows):
        alone = bench.family.hybrid and row.kind in ("prefix", "deep")
        with _alone(bench, row) if alone else bench.reading(row) as inputs:
            wanted = bench.model.generate(**inputs, **options, use_cache=alone)
        mine = slice(2 * number, 2 * number + 2)
        start = inputs["input_ids"].shape[1]
        assert out.sequences[mine, batch.width :].tolist() == wanted.sequences[:, start:].tolist()
        measure.close(out.sequences_scores[mine], wanted.sequences_scores, at_least=2e-5)


@contextmanager
def _alone(bench: Bench, row: Row) -> Iterator[dict[str, Tensor]]:
    batch = bench.batch([row], "left")
    with prompts(bench.model, bench.values([row]), batch.encoded):
        yield batch.inputs


@_feature("Static cache", DECODERS)
def static_cache(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """As Greedy, with `cache_implementation="static"`."""
    _generate(bench, rows, measure, cache_implementation="static")


@_feature("Sliding cache", DECODERS, sliding=True)
def sliding_cache(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """As Greedy, until the cache has dropped the whole text it began with."""
    out = _generate(bench, rows, measure, new=14)
    assert any(out.past_key_values.is_sliding)


@_feature("Quantised cache", DECODERS)
def quantised_cache(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """The row alone with the same 4-bit cache; the prompt itself is not in the cache and stays whole."""
    config = {"backend": "quanto", "nbits": 4, "q_group_size": 4, "residual_length": 1}
    options = {"max_new_tokens": NEW, "cache_implementation": "quantized", "cache_config": config}
    single = bench.single
    batch = single.batch(rows, "left")
    with prompts(single.model, single.values(rows), batch.encoded):
        out = single.model.generate(**batch.inputs, **_GREEDY, **options)
    for number, row in enumerate(rows):
        alone = single.batch([row], "left")
        with prompts(single.model, single.values([row]), alone.encoded):
            wanted = single.model.generate(**alone.inputs, **_GREEDY, **options)
        assert out.sequences[number, batch.width :].tolist() == wanted.sequences[0, alone.width :].tolist()
        measure.close(torch.stack(out.logits)[:, number], torch.stack(wanted.logits)[:, 0], at_least=2e-4)


@_feature("use_cache=False", DECODERS)
def no_cache(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """As Greedy, without a cache."""
    _generate(bench, rows, measure, use_cache=False)


@_feature("Chunked prefill", DECODERS)
def chunked_prefill(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """As Greedy, with `prefill_chunk_size=4`."""
    _generate(bench, rows, measure, prefill_chunk_size=4)


@_feature("Multi-turn past_key_values", DECODERS)
def multi_turn(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """As Greedy over both turns, the second one continuing the first one's cache."""
    batch, values = bench.batch(rows, "left"), bench.values(rows)
    turn = torch.tensor([[9, 33, 5]]).expand(len(rows), -1)
    with prompts(bench.model, values, batch.encoded):
        first = bench.model.generate(**batch.inputs, **_GREEDY, max_new_tokens=NEW)
    ids = torch.cat([first.sequences, turn], dim=1)
    mask = torch.nn.functional.pad(batch.encoded.attention_mask, (0, ids.shape[1] - batch.width), value=1)
    with prompts(bench.model, values, batch.encoded):
        out = bench.model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, **_GREEDY, max_new_tokens=NEW
        )
    longer = [row.longer(torch.cat([bench.greedy(row, NEW), turn[0]])) for row in rows]
    _answers(bench, longer, out, out.sequences[:, ids.shape[1] :], measure)


@_feature("Continued generation", DECODERS)
def continued(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """As Greedy over both halves, the second one starting from the first one's text."""
    batch, values = bench.batch(rows, "left"), bench.values(rows)
    with prompts(bench.model, values, batch.encoded):
        first = bench.model.generate(**batch.inputs, do_sample=False, max_new_tokens=NEW)
        mask = torch.nn.functional.pad(batch.encoded.attention_mask, (0, NEW), value=1)
        out = bench.model.generate(input_ids=first, attention_mask=mask, **_GREEDY, max_new_tokens=3)
    longer = [row.longer(bench.greedy(row, NEW)) for row in rows]
    _answers(bench, longer, out, out.sequences[:, first.shape[1] :], measure)


@_feature("inputs_embeds", ALL)
def inputs_embeds(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """As Mixed rows, the caller passing embeddings instead of ids."""
    batch = bench.batch(rows, "right")
    embedded = bench.model.get_input_embeddings()(batch.encoded.input_ids)
    with torch.no_grad(), prompts(bench.model, bench.values(rows), batch.encoded):
        logits = bench.model(inputs_embeds=embedded, attention_mask=batch.encoded.attention_mask).logits
    for number, row in enumerate(rows):
        measure.close(logits[number, batch.places[number]], bench.said(row))


@_feature("Generating from inputs_embeds", DECODERS)
def generating_from_embeddings(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """As Greedy, the caller passing embeddings instead of ids."""
    batch = bench.batch(rows, "left")
    embedded = bench.model.get_input_embeddings()(batch.encoded.input_ids)
    mask = batch.encoded.attention_mask
    with prompts(bench.model, bench.values(rows), batch.encoded):
        out = bench.model.generate(inputs_embeds=embedded, attention_mask=mask, **_GREEDY, max_new_tokens=NEW)
    _answers(bench, rows, out, out.sequences, measure)


@_feature("Assisted decoding", DECODERS)
def assisted(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """As Greedy, row by row, a smaller model guessing ahead."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    assistant = LlamaForCausalLM(config).eval()
    assistant.generation_config.eos_token_id = None
    for row in rows:
        _generate(bench, [row], measure, assistant_model=assistant)


@_feature("Prompt lookup", DECODERS)
def prompt_lookup(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """As Greedy, row by row, guesses coming from the text (which is repeated, so that there are some)."""
    for row in rows:
        _generate(bench, [row.longer(row.text)], measure, prompt_lookup_num_tokens=3)


@_feature("logits_to_keep", DECODERS)
def logits_to_keep(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """As Mixed rows, only the last two positions asked for."""
    batch = bench.batch(rows, "left")
    with torch.no_grad(), prompts(bench.model, bench.values(rows), batch.encoded):
        logits = bench.model(**batch.inputs, logits_to_keep=2).logits
    for number, (row, place) in enumerate(zip(rows, batch.places, strict=True)):
        kept = place >= batch.width - 2
        measure.close(logits[number, place[kept] - batch.width], bench.said(row)[kept])


@_feature("Packed sequences", DECODERS)
def packed(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """Each sequence alone: several texts in one row under one prompt, told apart by their positions."""
    texts = [row.text for row in rows[:3]]
    ids, positions = torch.cat(texts)[None], torch.cat([torch.arange(len(text)) for text in texts])[None]
    for row in rows:
        if row.kind != "none" and not bench.runs_ahead(row):
            continue
        with torch.no_grad(), prompts(bench.model, bench.value(row)):
            logits = bench.model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        for text, got in zip(texts, logits.split([len(text) for text in texts]), strict=True):
            measure.close(got, bench.plain(Row(row.kind, row.words, text)))


# The attention seam's options


@_feature('attention="merge"', rows="prefix")
def merge(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """As Mixed rows, over prefixes, by the path that attends to text and prefix apart."""
    _forward(bench, rows, measure, "left", attention="merge")


@_feature('attention="concatenate"', rows="prefix")
def concatenate(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """As Mixed rows, over prefixes, by the path that puts the prefix's keys in front of the text's."""
    _forward(bench, rows, measure, "left", attention="concatenate")


@_feature('sliding="window"', DECODERS, rows="prefix", sliding=True)
def window(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """The plain model reading the words as text, which its windows leave behind; no explicit mask."""
    batch = bench.batch(rows, "left")
    with torch.no_grad(), prompts(bench.model, bench.values(rows), batch.encoded, sliding="window"):
        logits = bench.model(**batch.inputs).logits
    for number, row in enumerate(rows):
        wanted = bench.plain(Row("inside", row.words, row.text, (0,) * len(row.words)))
        measure.close(logits[number, batch.places[number]], wanted)


# Other bases


@_feature("Eager attention")
def eager(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """As Mixed rows, `attn_implementation="eager"`, whose softmax is fp32: 2e-4."""
    _forward(bench.eager, rows, Wider(measure, 2e-4), "left")


@_feature("CPU offload")
def offload(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """As Mixed rows, the weights kept away by `accelerate.cpu_offload` until a layer runs."""
    from accelerate import cpu_offload

    model = bench.family.build(bench.model.dtype)
    cpu_offload(model, execution_device=torch.device("cpu"))
    _forward(bench, rows, measure, "right", model)


@_feature("bf16 base")
def bf16(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """fp32 prompts on a bf16 base are no farther from the truth in fp64 than twice what the base is on the words."""
    _half(bench, rows, torch.bfloat16, measure)


@_feature("fp16 base")
def fp16(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """fp32 prompts on an fp16 base are no farther from the truth in fp64 than twice what the base is on the words."""
    _half(bench, rows, torch.float16, measure)


def _half(bench: Bench, rows: Sequence[Row], dtype: torch.dtype, measure: Measure) -> None:
    half = Bench(bench.family, bench.family.build(dtype))
    batch = half.batch(rows, "right")
    own = max(float((half.said(row) - bench.said(row)).abs().max()) for row in rows)
    with torch.no_grad(), prompts(half.model, bench.values(rows, torch.float32), batch.encoded):
        logits = half.model(**batch.inputs).logits
    for number, row in enumerate(rows):
        measure.close(logits[number, batch.places[number]], bench.said(row), at_least=2 * own)


@_feature("8-bit base (torchao)")
def torchao_int8(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """The quantised model itself reading the words, in fp32: 2e-4."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = bench.family.build(torch.float32)
    quantize_(model, Int8WeightOnlyConfig())
    _forward(Bench(bench.family, model), rows, Wider(measure, 2e-4), "right")


@_feature("4-bit base (quanto)")
def quanto_int4(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """The quantised model itself reading the words, in fp32: 2e-4."""
    from optimum.quanto import freeze, qint4, quantize

    model = copy.deepcopy(bench.family.build(torch.float32))
    quantize(model, weights=qint4)
    freeze(model)
    _forward(Bench(bench.family, model), rows, Wider(measure, 2e-4), "right")


class Wider(Measure):
    """A wider tolerance, noted in the same place."""

    def __init__(self, inner: Measure, tolerance: float) -> None:
        super().__init__(max(inner.tolerance, tolerance))
        self.inner = inner

    def close(self, got: Tensor, wanted: Tensor, *, at_least: float = 0.0) -> None:
        """As `Measure.close`."""
        super().close(got, wanted, at_least=at_least)
        self.inner.largest = max(self.inner.largest, self.largest)
