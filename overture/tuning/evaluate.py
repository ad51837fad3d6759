"""How well a prompt, or the frozen model, predicts rows of text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from overture.errors import ConfigError
from overture.prompt import SoftPrompt
from overture.runtime.encode import batch_rows
from overture.runtime.generate import generate_ids
from overture.runtime.tokens import filler_id
from overture.spec import ModelSpec
from overture.template import Template
from overture.tuning.cohort import mean_losses
from overture.tuning.config import TuneConfig
from overture.tuning.data import Source, load_rows
from overture.tuning.example import Example
from overture.tuning.forward import frozen
from overture.tuning.prepare import encode_for, require_causal

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
    template: str | Template | None = None,
    exact_match: bool = False,
    batch_size: int = 64,
    truncate: bool = False,
) -> EvalResult:
    """Measure a prompt on rows of data.

    Args:
        model: the base model.
        tokenizer: its tokenizer.
        prompt: the prompt; None for the frozen model.
        data: rows as `tune` takes them.
        template: for the frozen model: a template whose columns the rows have. The model reads its text without the
            virtual tokens. None for rows as `tune` takes them without a template; a prompt brings its own.
        exact_match: also generate greedily and compare with the completions.
        batch_size: rows generated at once, 1 or more.
        truncate: cut the left side of rows that are too long, instead of refusing them.

    Raises:
        DataError: the data cannot be used.
        BaseMismatchError: the prompt belongs to another base model.
        ConfigError: a template for a prompt, which brings its own, or a template without virtual tokens.
        UnsupportedModelError: the model is no causal language model.
    """
    rows = load_rows(data, kind="evaluation")
    if batch_size < 1:
        raise ConfigError(expected="batch_size of 1 or more", got=str(batch_size), do="use the default, 64")
    if prompt is not None and template is not None:
        raise ConfigError(
            expected="a template for the frozen model only",
            got=f"one for the prompt {prompt.name!r}",
            do="leave template out; a prompt brings its own",
        )
    spec = require_causal(model)
    if prompt is not None:
        prompt.check_base(spec.base)
        form = prompt.template
    else:
        form = Template.parse(template) if isinstance(template, str) else template
    examples = encode_for(spec, tokenizer, prompt, form, rows, truncate=truncate)
    if prompt is None:
        examples = [example.without_slots() for example in examples]
    filler = filler_id(tokenizer)
    with frozen(model):
        loss = mean_losses(model, [(prompt, examples)], TuneConfig(), filler)[0]
        matched = _matches(model, tokenizer, prompt, examples, batch_size) if exact_match else None
    return EvalResult(loss, sum(e.num_targets for e in examples), len(rows), matched)


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
    context = ModelSpec.of(model).max_positions or 2**31
    ahead = 0 if prompt is None else prompt.length
    for group in _groups(examples, batch_size, context - ahead):
        sides = [example.split() for example in group]
        batch = batch_rows([side for side, _ in sides], filler, "left")
        room = max(len(answer) for _, answer in sides)
        new = generate_ids(model, [prompt] * len(group), batch, filler=filler, max_new_tokens=room, do_sample=False)
        for answer, (_, wanted) in zip(new.tolist(), sides, strict=True):
            hits += answer[: len(wanted)] == list(wanted)
    return hits / len(examples)


def _groups(examples: Sequence[Example], batch_size: int, room: int) -> Iterator[list[Example]]:
    """Runs of rows generated together, so that the longest answer fits behind the longest text."""
    group: list[Example] = []
    text = answer = 0
    for example in examples:
        span = example.answer
        text, answer = max(text, span.start), max(answer, span.stop - span.start)
        if group and (len(group) == batch_size or text + answer > room):
            yield group
            group, text, answer = [], span.start, span.stop - span.start
        group.append(example)
    yield group
