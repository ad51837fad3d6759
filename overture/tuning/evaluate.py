"""How well a prompt, or the frozen model, predicts rows of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from overture.prompt import SoftPrompt
from overture.runtime.encode import batch_rows
from overture.runtime.generate import generate_ids
from overture.runtime.host import stands_in_text
from overture.runtime.tokens import filler_id
from overture.spec import ModelSpec
from overture.tuning.cohort import mean_losses
from overture.tuning.config import TuneConfig
from overture.tuning.data import Row, Source, load_rows
from overture.tuning.example import Example
from overture.tuning.examples import encode_rows
from overture.tuning.forward import frozen

__all__ = ["EvalResult", "evaluate"]


@dataclass(frozen=True, slots=True)
class EvalResult:
    """One prompt measured on rows of data."""

    loss: float
    """Mean loss per target token, nats."""
    tokens: int
    """Target tokens."""
    rows: int
    """Rows."""
    exact_match: float | None
    """Share of rows whose greedy answer is exactly the completion, 0 to 1; None if it was not asked for."""

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(min(self.loss, 700.0))


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: SoftPrompt | None,
    data: Source,
    *,
    exact_match: bool = False,
    batch_size: int = 64,
) -> EvalResult:
    """Measure a prompt on rows of data.

    Args:
        model: the base model.
        tokenizer: its tokenizer.
        prompt: the prompt; None for the frozen model.
        data: rows as `tune` takes them.
        exact_match: also generate greedily and compare with the completions.
        batch_size: rows generated at once.

    Raises:
        DataError: the data cannot be used.
        BaseMismatchError: the prompt belongs to another base model.
    """
    rows = load_rows(data, kind="evaluation")
    examples = _examples(model, tokenizer, prompt, rows)
    filler = filler_id(tokenizer)
    with frozen(model):
        loss = mean_losses(model, [(prompt, examples)], TuneConfig(), filler)[0]
        matched = _matches(model, tokenizer, prompt, examples, batch_size) if exact_match else None
    return EvalResult(loss, sum(e.num_targets for e in examples), len(rows), matched)


def _examples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: SoftPrompt | None, rows: Sequence[Row]
) -> list[Example]:
    spec = ModelSpec.of(model)
    template = prompt.template if prompt is not None else None
    limit = (spec.max_positions or 2**31) - (prompt.length if prompt is not None else 0)
    examples = encode_rows(rows, tokenizer, template=template, max_tokens=limit)
    if prompt is not None and stands_in_text(spec, prompt) and (template is None or template.leading):
        return [example.with_leading(prompt.length, filler_id(tokenizer)) for example in examples]
    return examples


def _matches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: SoftPrompt | None,
    examples: Sequence[Example],
    batch_size: int,
) -> float:
    """Share of rows whose greedy answer is the completion, token by token up to the end-of-text token."""
    hits = 0
    filler = filler_id(tokenizer)
    for start in range(0, len(examples), batch_size):
        group = examples[start : start + batch_size]
        sides = [example.split() for example in group]
        batch = batch_rows([side for side, _ in sides], filler, "left")
        room = max(len(answer) for _, answer in sides)
        new = generate_ids(model, [prompt] * len(group), batch, filler=filler, max_new_tokens=room, do_sample=False)
        for answer, (_, wanted) in zip(new.tolist(), sides, strict=True):
            hits += answer[: len(wanted)] == list(wanted)
    return hits / len(examples)
