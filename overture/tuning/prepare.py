"""Rows of data as the examples of one prompt: how much text fits, and where the virtual tokens stand."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from overture.errors import ContextLengthError, UnsupportedModelError
from overture.prompt import BlockInputs
from overture.runtime.generate import foreign_id
from overture.runtime.host import stands_in_text
from overture.runtime.prompts import Piece
from overture.runtime.tokens import filler_id
from overture.spec import ModelSpec
from overture.template import Template
from overture.tuning.data import BadRow, Row, raise_bad_rows
from overture.tuning.example import Example
from overture.tuning.examples import encode_rows

__all__ = ["encode_for", "require_causal"]

_ENDLESS = 2**31


def encode_for(
    spec: ModelSpec,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Piece | None,
    template: Template | None,
    rows: Sequence[Row],
    *,
    max_length: int | None = None,
    truncate: bool = False,
) -> list[Example]:
    """Turn rows into the examples of one prompt, with places for its virtual tokens where the text must hold them.

    Args:
        spec: the base model's.
        tokenizer: its tokenizer.
        prompt: the prompt; None for the frozen model, which reads the rows without their places.
        template: where the virtual tokens stand; None for in front of the text.
        rows: the rows.
        max_length: longest row in tokens, virtual tokens included; None for the model's context.
        truncate: cut rows that are too long, instead of refusing them.

    Raises:
        DataError: rows that cannot be used, or ids the model has no embedding for.
        ContextLengthError: the virtual tokens leave no room for text.
    """
    # Virtual tokens of a template count among an example's own tokens, leading ones do not.
    inside = template is not None and not template.leading
    places = template.num_virtual_tokens if template is not None and inside else 0
    room = _room(spec, max_length, places if prompt is None else prompt.length)
    examples = encode_rows(rows, tokenizer, template=template, max_tokens=room + places, truncate=truncate)
    raise_bad_rows(_foreign(spec, rows, examples))
    if prompt is None or isinstance(prompt, BlockInputs):
        return examples
    if stands_in_text(spec, prompt) and not inside:
        return [example.with_leading(prompt.length, filler_id(tokenizer)) for example in examples]
    return examples


def require_causal(model: PreTrainedModel) -> ModelSpec:
    """The spec of a model that predicts the next token.

    Raises:
        UnsupportedModelError: the model has no language modelling head, reads both ways, or is an encoder-decoder.
    """
    spec = ModelSpec.of(model)
    if model.config.is_encoder_decoder:
        got = "an encoder-decoder"
    elif model.get_output_embeddings() is None:
        got = "a model without a language modelling head"
    # Without an attention call to be seen (GPT-J), only the class tells that the model writes from left to right.
    elif not (spec.is_decoder if spec.layers else model.can_generate()):
        got = "a model that sees the text on both sides"
    else:
        return spec
    raise UnsupportedModelError(
        expected="a causal language model",
        got=f"{type(model).__name__}, {got}",
        do="load the model with AutoModelForCausalLM.from_pretrained(...)",
    )


def _room(spec: ModelSpec, max_length: int | None, length: int) -> int:
    """Tokens left for text beside the virtual tokens."""
    context = min(max_length or _ENDLESS, spec.max_positions or _ENDLESS)
    if context - length < 2:
        raise ContextLengthError(
            expected=f"virtual tokens that leave room for text in a context of {context} tokens",
            got=f"{length} virtual tokens",
            do="use fewer virtual tokens (10 to 50 are usual) or a larger max_length",
        )
    return context - length


def _foreign(spec: ModelSpec, rows: Sequence[Row], examples: Sequence[Example]) -> list[BadRow]:
    return [
        (row.where, foreign_id(max(e.ids), spec.vocab_size))
        for row, e in zip(rows, examples, strict=True)
        if max(e.ids) >= spec.vocab_size
    ]
