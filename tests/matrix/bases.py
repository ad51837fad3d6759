"""The attention seam's options, and bases of other precisions and places."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch

from overture.runtime.prompts import prompts
from tests.matrix.bench import Bench, Row
from tests.matrix.feature import DECODERS, Group, Measure, Wider
from tests.matrix.forward import forward

__all__ = ["GROUP"]

GROUP = Group("Attention and bases")


@GROUP.feature('attention="merge"', rows="prefix")
def merge(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """As Mixed rows, over prefixes, by the path that attends to text and prefix apart."""
    forward(bench, rows, measure, bench.sides[-1], attention="merge")


@GROUP.feature('attention="concatenate"', rows="prefix")
def concatenate(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """As Mixed rows, over prefixes, by the path that puts the prefix's keys in front of the text's."""
    forward(bench, rows, measure, bench.sides[-1], attention="concatenate")


@GROUP.feature('sliding="window"', DECODERS, rows="prefix", sliding=True)
def window(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """The plain model reading the words as text, which its windows leave behind; no explicit mask."""
    batch = bench.batch(rows, "left")
    with torch.no_grad(), prompts(bench.model, bench.values(rows), batch.encoded, sliding="window"):
        logits = bench.model(**batch.inputs).logits
    for number, row in enumerate(rows):
        with torch.no_grad():
            wanted = bench.model(input_ids=torch.cat([row.words, row.text])[None]).logits[0, len(row.words) :]
        measure.close(logits[number, batch.places[number]], wanted)


@GROUP.feature('Generating, sliding="window"', DECODERS, rows="prefix", sliding=True)
def generating_in_window(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """The plain model's own greedy tokens and logits behind the words as text."""
    batch = bench.batch(rows, "left")
    options = {"do_sample": False, "max_new_tokens": 10, "return_dict_in_generate": True, "output_logits": True}
    with prompts(bench.model, bench.values(rows), batch.encoded, sliding="window"):
        out = bench.model.generate(**batch.asked, **options)
    for number, row in enumerate(rows):
        ids = torch.cat([row.words, row.text])[None]
        wanted = bench.model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
        assert out.sequences[number, batch.width :].tolist() == wanted.sequences[0, ids.shape[1] :].tolist()
        measure.close(torch.stack(out.logits)[:, number], torch.stack(wanted.logits)[:, 0], at_least=2e-5)


@GROUP.feature("Eager attention")
def eager(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """As Mixed rows, `attn_implementation="eager"`, whose softmax is fp32: 2e-4."""
    forward(bench.eager, rows, Wider(measure, 2e-4), bench.sides[-1])


@GROUP.feature("CPU offload")
def offload(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """As Mixed rows, the weights kept away by `accelerate.cpu_offload` until a layer runs."""
    from accelerate import cpu_offload

    model = bench.family.build(bench.model.dtype)
    cpu_offload(model, execution_device=torch.device("cpu"))
    forward(bench, rows, measure, "right", model)


@GROUP.feature("bf16 base")
def bf16(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """fp32 prompts on a bf16 base are about as far from the truth in fp64 as the base itself is on the words."""
    _half(bench, rows, torch.bfloat16, measure)


@GROUP.feature("fp16 base")
def fp16(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """fp32 prompts on an fp16 base are about as far from the truth in fp64 as the base itself is on the words."""
    _half(bench, rows, torch.float16, measure)


def _half(bench: Bench, rows: Sequence[Row], dtype: torch.dtype, measure: Measure) -> None:
    half = type(bench)(bench.family, bench.family.build(dtype))
    batch = half.batch(rows, "right")
    with torch.no_grad(), prompts(half.model, bench.values(rows, torch.float32), batch.encoded):
        logits = half.model(**batch.inputs).logits
    truth = torch.cat([bench.said(row) for row in rows])
    off = torch.cat([logits[number, place] for number, place in enumerate(batch.places)]) - truth
    own = torch.cat([half.said(row) for row in rows]) - truth
    bare = truth - torch.cat([bench.plain(replace(row, kind="none", words=row.words[:0])) for row in rows])
    # Root mean squares: a router may send one token elsewhere for a rounding.
    assert own.square().mean() < bare.square().mean() / 16, "the base is too far off to show a prompt"
    assert off.square().mean() <= 2 * own.square().mean()
    measure.note(off)


@GROUP.feature("8-bit base (torchao)")
def torchao_int8(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """The quantised model itself reading the words, in fp32: 2e-4."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = bench.family.build(torch.float32)
    quantize_(model, Int8WeightOnlyConfig())
    forward(type(bench)(bench.family, model), rows, Wider(measure, 2e-4), "right")


@GROUP.feature("4-bit base (quanto)")
def quanto_int4(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """The quantised model itself reading the words, in fp32: 2e-4."""
    from optimum.quanto import freeze, qint4, quantize

    model = copy.deepcopy(bench.family.build(torch.float32))
    quantize(model, weights=qint4)
    freeze(model)
    forward(type(bench)(bench.family, model), rows, Wider(measure, 2e-4), "right")
