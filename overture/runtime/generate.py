"""Generation through transformers' own `generate`, every row under its own prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from overture.errors import ConfigError, ContextLengthError
from overture.prompt import SoftPrompt
from overture.runtime.encode import Encoded, Item, encode
from overture.runtime.host import stands_in_text
from overture.runtime.prompts import prompts as using_prompts
from overture.runtime.tokens import filler_id
from overture.spec import ModelSpec

__all__ = ["generate", "generate_ids"]

_DEFAULT_NEW_TOKENS = 64


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: SoftPrompt | Sequence[SoftPrompt | None] | None,
    inputs: Sequence[Item],
    *,
    streamer: Any = None,
    **options: Any,
) -> list[str]:
    """Answer every input under its own prompt, all in one batch.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer; it needs no padding token.
        prompts: one prompt per input, or one for all; None is the frozen model.
        inputs: texts, message lists, or mappings with the columns of the prompt's template.
        streamer: a transformers streamer, for a single input.
        **options: anything `model.generate` takes: `max_new_tokens` (64 if not given), `do_sample`, `num_beams`, ...

    Returns:
        The new text of each input; with `num_return_sequences=n`, n texts for the first input, then n for the next.

    Raises:
        ConfigError: not one prompt per input.
        DataError: an input cannot be encoded.
        ContextLengthError: an input is longer than the model's context.
        BaseMismatchError: a prompt belongs to another base model.
    """
    rows = list(prompts) if isinstance(prompts, Sequence) else [prompts] * len(inputs)
    if len(rows) != len(inputs):
        raise ConfigError(
            expected=f"one prompt per input ({len(inputs)}), or a single prompt",
            got=f"{len(rows)} prompts",
            do="repeat prompts or inputs so that they pair up",
        )
    batch = encode(tokenizer, inputs, rows, spec=ModelSpec.of(model))
    new = generate_ids(model, rows, batch, filler=filler_id(tokenizer), streamer=streamer, **options)
    return tokenizer.batch_decode(new, skip_special_tokens=True)


@torch.no_grad()
def generate_ids(
    model: PreTrainedModel,
    rows: Sequence[SoftPrompt | None],
    batch: Encoded,
    *,
    filler: int,
    **options: Any,
) -> Int[Tensor, "B T"]:
    """New token ids of each row of an encoded batch.

    Args:
        model: a causal language model.
        rows: one prompt or None per row.
        batch: left-padded inputs.
        filler: token id that fills up rows which end early.
        **options: anything `model.generate` takes.

    Returns:
        [B, T] new tokens, without the input.
    """
    batch = batch.to(model.device)
    _check_room(model, rows, batch)
    options.setdefault("max_new_tokens", _DEFAULT_NEW_TOKENS)
    options = {"pad_token_id": filler} | {name: value for name, value in options.items() if value is not None}
    with using_prompts(model, rows, batch):
        ids: Tensor = cast(Any, model).generate(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options
        )
    return ids[:, batch.input_ids.shape[1] :]


def _check_room(model: PreTrainedModel, rows: Sequence[SoftPrompt | None], batch: Encoded) -> None:
    spec = ModelSpec.of(model)
    ahead = [0 if row is None or stands_in_text(spec, row) else row.length for row in rows]
    longest = max(p + t for p, t in zip(ahead, batch.attention_mask.sum(1).tolist(), strict=True))
    if spec.max_positions is not None and longest >= spec.max_positions:
        raise ContextLengthError(
            expected=f"virtual tokens and input within the model's {spec.max_positions} positions, with room to answer",
            got=f"{longest} positions",
            do="shorten the input or use a prompt with fewer virtual tokens",
        )
