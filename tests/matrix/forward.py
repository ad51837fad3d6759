"""Forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from transformers import PreTrainedModel

from overture.methods import DeepPrompt, PrefixTuning, PromptTuning, PTuning
from overture.runtime.compile import Frozen
from overture.runtime.fold import fold
from overture.runtime.prompts import prompts
from tests.matrix.bench import Bench, Row
from tests.matrix.feature import DECODERS, ONE_STACK, Group, Measure

__all__ = ["GROUP", "Words", "forward"]

GROUP = Group("Forward")


@GROUP.feature("Deep prompts", rows="deep")
@GROUP.feature("Virtual tokens inside the text", rows="inside")
@GROUP.feature("Leading virtual tokens", rows="leading")
@GROUP.feature("KV prefix", rows="prefix")
def one_kind(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """The plain model reading the words of each row alone; P = 1, 7, 33 and no prompt in one batch, either padding."""
    for side in bench.sides:
        forward(bench, rows, measure, side)


@GROUP.feature("Mixed rows, right padding")
def right_padded(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """The plain model reading the words of each row alone; all kinds of prompts, and none, in one batch."""
    forward(bench, rows, measure, "right")


@GROUP.feature("Mixed rows, left padding")
def left_padded(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """The plain model reading the words of each row alone; all kinds of prompts, and none, in one batch."""
    forward(bench, rows, measure, "left")


def forward(
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


@GROUP.feature("logits_to_keep", DECODERS)
def logits_to_keep(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """As Mixed rows, only the last two positions asked for."""
    batch = bench.batch(rows, "left")
    with torch.no_grad(), prompts(bench.model, bench.values(rows), batch.encoded):
        logits = bench.model(**batch.inputs, logits_to_keep=2).logits
    for number, (row, place) in enumerate(zip(rows, batch.places, strict=True)):
        kept = place >= batch.width - 2
        measure.close(logits[number, place[kept] - batch.width], bench.said(row)[kept])


@GROUP.feature("inputs_embeds", ONE_STACK)
def inputs_embeds(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """As Mixed rows, the caller passing embeddings instead of ids."""
    batch = bench.batch(rows, "right")
    embedded = bench.model.get_input_embeddings()(batch.encoded.input_ids)
    with torch.no_grad(), prompts(bench.model, bench.values(rows), batch.encoded):
        logits = bench.model(inputs_embeds=embedded, attention_mask=batch.encoded.attention_mask).logits
    for number, row in enumerate(rows):
        measure.close(logits[number, batch.places[number]], bench.said(row))


@GROUP.feature("Methods started from words", ONE_STACK)
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
