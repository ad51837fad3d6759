"""One forward pass over rows of many prompts.

Shape suffixes: B rows, T text, N chosen positions, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from overture.prompt import Head, SoftPrompt
from overture.runtime.packed import packed, packs
from overture.runtime.prompts import Piece, RowPrompt, prompts
from overture.runtime.reading import Encoded, batch_rows
from overture.spec import ModelSpec, evaluating, execution_device, gives_plain_logits, settled, unwrapped
from overture.tuning.chunked import chunked_cross_entropy, precise
from overture.tuning.example import Example

__all__ = ["Trained", "collate", "frozen", "precise", "run", "selected_logits", "token_losses"]


class Trained(NamedTuple):
    """What a row is run under."""

    value: Piece | None
    """Its prompt; None for the frozen model."""
    head: Head | None
    """Its head; None for the model's own."""
    behind: SoftPrompt | None = None
    """A fixed prompt in front of it; None for none."""

    @property
    def row(self) -> RowPrompt:
        """What stands before the row's text."""
        return self.value if self.behind is None else (self.behind, self.value)


def collate(examples: Sequence[Example], filler: int) -> Encoded:
    """Examples as one batch, padded on the right."""
    return batch_rows(examples, filler, "right")


def run(model: PreTrainedModel, rows: Sequence[Trained], examples: Sequence[Example], filler: int, **more: Any) -> Any:
    """The model's output for a batch of examples, each under its own prompt and head.

    Args:
        model: the frozen model.
        rows: one per example.
        examples: the rows.
        filler: token id that stands in the padding.
        **more: further keywords of the forward pass.
    """
    batch = collate(examples, filler).to(execution_device(model))
    with prompts(model, [row.row for row in rows], batch, heads=[row.head for row in rows]):
        return model(**batch.inputs(), **_without_cache(model), **more)


def selected_logits(
    model: PreTrainedModel,
    rows: Sequence[Trained],
    examples: Sequence[Example],
    filler: int,
    places: Sequence[tuple[int, int]],
) -> Float[Tensor, "N V"]:
    """A language model's logits at chosen positions alone.

    The rows are read end to end where the model can, so that nothing is computed for padding.

    Args:
        model: a model with an output embedding.
        rows: one per example.
        examples: the rows.
        filler: token id that stands in the padding.
        places: row and column of each position.
    """
    logits: Tensor = _chosen(model, rows, examples, filler, places, lambda hidden: hidden).logits
    return precise(logits.flatten(0, -2))


def token_losses(
    model: PreTrainedModel,
    rows: Sequence[Trained],
    examples: Sequence[Example],
    filler: int,
    places: Sequence[tuple[int, int]],
    wanted: Sequence[int],
) -> Float[Tensor, " N"]:
    """A language model's cross-entropy at chosen positions alone.

    Args:
        model: a decoder with an output embedding.
        rows: one per example.
        examples: the rows.
        filler: token id that stands in the padding.
        places: row and column of each position.
        wanted: the token that ought to follow each position.
    """
    targets = torch.tensor(wanted, device=execution_device(model))
    if any(row.head is not None for row in rows) or not gives_plain_logits(unwrapped(model)):
        logits = selected_logits(model, rows, examples, filler, places)
        return cross_entropy(logits, targets, reduction="none")
    seen: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return hidden[:1].detach()  # the model shall answer something

    _chosen(model, rows, examples, filler, places, keep)
    return chunked_cross_entropy(model.get_output_embeddings(), seen[0], targets, ModelSpec.of(model).vocab_size)


def _chosen(
    model: PreTrainedModel,
    rows: Sequence[Trained],
    examples: Sequence[Example],
    filler: int,
    places: Sequence[tuple[int, int]],
    shown: Callable[[Tensor], Tensor],
) -> Any:
    """The model's output, its output embedding seeing what `shown` makes of the hidden states at `places`."""
    packing = packs(model) and all(row.head is None for row in rows) and all(e.slots is None for e in examples)
    lengths = [len(example) for example in examples]
    starts = [0, *accumulate(lengths)] if packing else [max(lengths) * row for row in range(len(rows))]
    chosen = torch.tensor([starts[row] + column for row, column in places], dtype=torch.long)
    with _only(model, chosen.to(execution_device(model)), shown):
        return _run_packed(model, rows, examples) if packing else run(model, rows, examples, filler)


def _run_packed(model: PreTrainedModel, rows: Sequence[Trained], examples: Sequence[Example]) -> Any:
    """The model's output for examples end to end, as one row."""
    ids = torch.tensor([[token for example in examples for token in example.ids]], device=execution_device(model))
    with packed(model, [row.row for row in rows], [len(example) for example in examples]):
        return model(input_ids=ids, **_without_cache(model))


def _without_cache(model: PreTrainedModel) -> dict[str, bool]:
    return {"use_cache": False} if "use_cache" in inspect.signature(unwrapped(model).forward).parameters else {}


@contextmanager
def _only(model: PreTrainedModel, chosen: Int[Tensor, " N"], shown: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The output layer sees what `shown` makes of the chosen positions alone, counted through all rows, as one row.

    The model's own forward pass does the rest, so that what it does to logits (softcap, scale) stays its own.
    """

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (shown(args[0].flatten(0, 1)[chosen])[None], *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """The model settled, in evaluation mode, its parameters without gradient; as it was afterwards."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    try:
        with evaluating(model), settled(model):
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
