"""Gradients, recomputation and packing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from overture.runtime.prompts import prompts
from tests.matrix.bench import Bench, Row
from tests.matrix.feature import DECODERS, Group, Measure

__all__ = ["GROUP"]

GROUP = Group("Training")


@GROUP.feature("Gradients", bare="inside")
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


@GROUP.feature("Gradient checkpointing", bare="inside")
def checkpointing(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """As Gradients, with transformers' own switch on, not reentrant."""
    _checkpointed(bench, rows, measure, reentrant=False)


@GROUP.feature("Reentrant checkpointing", bare="inside")
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


@GROUP.feature("Packed sequences", DECODERS)
def packed(bench: Bench, rows: Sequence[Row], measure: Measure) -> None:
    """Each sequence alone: several in one row under one prompt, `use_cache=False` (with a cache plain models mix them).

    They are told apart by position ids that begin anew, as TRL packs them, and have no attention mask.
    """
    texts = [row.text for row in rows[:3]]
    ids, positions = torch.cat(texts)[None], torch.cat([torch.arange(len(text)) for text in texts])[None]
    for row in rows:
        if row.kind != "none" and not bench.runs_ahead(row):
            continue
        with torch.no_grad(), prompts(bench.model, bench.value(row)):
            logits = bench.model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        for text, got in zip(texts, logits.split([len(text) for text in texts]), strict=True):
            measure.close(got, bench.plain(Row(row.kind, row.words, text)))
