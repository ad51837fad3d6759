"""Generation through transformers' own `generate`, every row under its own prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from overture.errors import ConfigError, ContextLengthError, DataError, UnsupportedModelError
from overture.prompt import SoftPrompt
from overture.runtime.compose import joined_rows
from overture.runtime.encode import Encoded, Item, encode
from overture.runtime.host import stands_in_text
from overture.runtime.prompts import prompts as using_prompts
from overture.runtime.tokens import filler_id
from overture.spec import ModelSpec, execution_device, task_of, unwrapped

__all__ = ["foreign_id", "generate", "generate_ids", "require_generation", "room"]

_DEFAULT_NEW_TOKENS = 64


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: SoftPrompt | Sequence[SoftPrompt | tuple[SoftPrompt | None, ...] | None] | None,
    inputs: Sequence[Item],
    *,
    streamer: Any = None,
    **options: Any,
) -> list[str]:
    """Answer every input under its own prompt, all in one batch.

    Args:
        model: a causal language model of transformers, or one that PEFT wraps.
        tokenizer: its tokenizer; it needs no padding token.
        prompts: one prompt per input, or one for all; None is the frozen model, and a tuple of prompts within the
            sequence is their join (see `join`).
        inputs: texts, message lists, or mappings with the columns of the prompt's template.
        streamer: a transformers streamer, for a single input.
        **options: anything `model.generate` takes: `max_new_tokens`, `do_sample`, `num_beams`, ... Without
            `max_new_tokens`, `max_length` and `generation_config`, 64 new tokens. However many are asked for, no more
            are generated than fit in the model's context beside the virtual tokens and the longest input.

    Returns:
        The new text of each input; with `num_return_sequences=n`, n texts for the first input, then n for the next.

    Raises:
        ConfigError: not one prompt per input.
        DataError: an input cannot be encoded, or has a token that the model lacks.
        ContextLengthError: virtual tokens and an input fill the model's context.
        UnsupportedModelError: the model cannot generate.
        BaseMismatchError: a prompt belongs to another base model.
    """
    model = unwrapped(model)
    require_generation(model)
    rows = joined_rows(model, prompts if isinstance(prompts, Sequence) else [prompts] * len(inputs))
    if len(rows) != len(inputs):
        raise ConfigError(
            expected=f"one prompt per input ({len(inputs)}), or a single prompt",
            got=f"{len(rows)} prompts",
            do="repeat prompts or inputs so that they pair up",
        )
    if not inputs:
        return []
    batch = encode(tokenizer, inputs, rows, spec=ModelSpec.of(model), complete=model.config.is_encoder_decoder)
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
        model: a causal language model, or an encoder-decoder.
        rows: one prompt or None per row.
        batch: inputs; those of a causal language model left-padded.
        filler: token id that fills up rows which end early.
        **options: anything `model.generate` takes.

    Returns:
        [B, T] new tokens, without the input.
    """
    batch = batch.to(execution_device(model))
    options = {name: value for name, value in options.items() if value is not None}
    read = 0 if model.config.is_encoder_decoder else batch.input_ids.shape[1]
    left = room(ModelSpec.of(model), rows, batch)
    # What an encoder reads takes no place of what the decoder writes.
    options |= _lengths(options, left if read else None, read)
    options = {"pad_token_id": filler} | options
    with using_prompts(model, rows, batch):
        out = cast(Any, model).generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options)
    ids: Tensor = out if isinstance(out, Tensor) else out.sequences
    # A decoder of its own begins with a token that is no answer.
    return ids[:, read or 1 :]


def foreign_id(found: int, vocab_size: int) -> DataError:
    """The error for a token id that the model has no embedding for."""
    return DataError(
        expected=f"token ids below {vocab_size}, the rows of the model's embedding",
        got=f"the id {found}",
        do="pass the model's own tokenizer, or call model.resize_token_embeddings(len(tokenizer)) for new tokens",
    )


def require_generation(model: PreTrainedModel, tasks: Sequence[str] = ("causal-lm", "seq2seq")) -> None:
    """Raise `UnsupportedModelError` unless the model writes text, and is for one of `tasks`."""
    if task_of(model) not in tasks or not model.can_generate():
        raise UnsupportedModelError(
            expected=f"a model that can generate, for {' or '.join(tasks)}",
            got=type(model).__name__,
            do="load the model with AutoModelForCausalLM.from_pretrained(...)",
        )


def room(spec: ModelSpec, rows: Sequence[SoftPrompt | None], batch: Encoded) -> int | None:
    """New tokens that fit behind the longest row; None if there is no limit.

    Raises:
        DataError: an id that the model has no embedding for.
        ContextLengthError: there is no room.
    """
    highest = int(batch.input_ids.max())
    if highest >= spec.vocab_size:
        raise foreign_id(highest, spec.vocab_size)
    ahead = [0 if row is None or stands_in_text(spec, row) else row.length for row in rows]
    limits = (spec.max_positions, spec.rotary_limit if any(ahead) else None)
    limit = min((limit for limit in limits if limit is not None), default=None)
    if limit is None:
        return None
    longest = max(p + t for p, t in zip(ahead, batch.attention_mask.sum(1).tolist(), strict=True))
    if longest >= limit:
        raise ContextLengthError(
            expected=f"virtual tokens and input within the model's {limit} positions, with room to answer",
            got=f"{longest} positions",
            do="shorten the input or use a prompt with fewer virtual tokens",
        )
    return int(limit - longest)


def _lengths(options: Mapping[str, Any], room: int | None, width: int) -> dict[str, int]:
    """How long to generate: what was asked for, by the option that asked for it, or as much of it as fits."""
    asked = options
    if "max_new_tokens" not in options and "max_length" not in options:
        config = options.get("generation_config")
        asked = {"max_new_tokens": _DEFAULT_NEW_TOKENS} if config is None else vars(config)
    for name, extra in (("max_new_tokens", 0), ("max_length", width)):
        value = asked.get(name)
        if value is not None:
            return {name: value if room is None else min(value, room + extra)}
    return {}
