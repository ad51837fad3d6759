"""How likely answers are behind what rows read, each row under its own prompt.

Shape suffixes: B rows, T text, S tokens of the longest answer.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedModel

from overture.errors import UnsupportedModelError
from overture.prompt import SoftPrompt
from overture.runtime.generate import room
from overture.runtime.prompts import prompts
from overture.runtime.reading import Encoded
from overture.spec import ModelSpec, execution_device

__all__ = ["log_likelihoods"]

_IGNORED = -100


@torch.no_grad()
def log_likelihoods(
    model: PreTrainedModel,
    rows: Sequence[SoftPrompt | None],
    batch: Encoded,
    answers: Sequence[Sequence[int]],
    filler: int,
) -> Float[Tensor, " B"]:
    """Log-probability (nats) of each row's answer, summed over its tokens.

    Args:
        model: a causal language model, or an encoder-decoder.
        rows: one prompt per row; None is the frozen model.
        batch: what the rows read, as `generate` takes it.
        answers: token ids, one answer per row.
        filler: token id that fills up shorter answers.

    Returns:
        [B], on the CPU.

    Raises:
        ContextLengthError: prompt, text and answer are longer than the model's context.
        DataError: an id that the model has no embedding for.
        UnsupportedModelError: an encoder-decoder whose decoder's input cannot be made of what it shall write.
    """
    longest = max(map(len, answers))
    labels = torch.tensor([[*ids, *[_IGNORED] * (longest - len(ids))] for ids in answers])
    both = model.config.is_encoder_decoder
    read = batch if both else _behind(batch, labels, filler)
    room(ModelSpec.of(model), rows, read)
    device = execution_device(model)
    read, labels = read.to(device), labels.to(device)
    options: dict[str, Any] = {}
    if both:
        options["decoder_input_ids"] = _shifted(model, labels)
    elif "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = longest + 1
    with prompts(model, rows, read):
        logits: Tensor = model(**read.inputs(), use_cache=False, **options).logits
    logits = logits if both else logits[:, -longest - 1 : -1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = cross_entropy(logits.transpose(1, 2), labels, ignore_index=_IGNORED, reduction="none")
    return -losses.sum(1).cpu()


def _behind(batch: Encoded, labels: Int[Tensor, "B S"], filler: int) -> Encoded:
    """The batch with the answers behind its rows, filled up on the right."""
    written = labels != _IGNORED
    longest = labels.shape[1]
    return Encoded(
        torch.cat([batch.input_ids, labels.where(written, filler)], dim=1),
        torch.cat([batch.attention_mask, written.long()], dim=1),
        None if batch.slots is None else pad(batch.slots, (0, longest), value=-1),
    )


def _shifted(model: PreTrainedModel, labels: Int[Tensor, "B S"]) -> Int[Tensor, "B S"]:
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:
        raise UnsupportedModelError(
            expected="an encoder-decoder that shifts its labels by itself, such as T5 or BART",
            got=type(model).__name__,
            do="load such a model with AutoModelForSeq2SeqLM",
        )
    shifted: Tensor = shift(labels=labels)
    return shifted
