"""Several prompts of one task answer every input together, in one mixed batch (Lester et al. 2021, arXiv:2104.08691).

Shape suffixes: B rows, N prompts, A answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from overture.errors import ConfigError
from overture.prompt import SoftPrompt
from overture.runtime.compose import joined_rows
from overture.runtime.encode import Item, encode
from overture.runtime.generate import generate_ids, require_generation
from overture.runtime.joint import asked, jointly
from overture.runtime.likelihood import log_likelihoods
from overture.runtime.tokens import eos_ids, filler_id, text_ids
from overture.runtime.whole import complete_row
from overture.spec import ModelSpec, evaluating, unwrapped

__all__ = ["EnsembleAnswer", "ensemble"]


@dataclass(frozen=True, slots=True)
class EnsembleAnswer:
    """What several prompts answer to one input."""

    answer: str
    """The answer, without spaces around it."""
    votes: Mapping[str, int]
    """How many prompts gave each answer on their own, most first; empty where they wrote one answer together."""
    scores: Mapping[str, float]
    """By answer, the log-probability (nats) of all its tokens, a mean over all prompts."""


def ensemble(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[SoftPrompt | tuple[SoftPrompt | None, ...] | None],
    inputs: Sequence[Item],
    *,
    choices: Sequence[str] | None = None,
    how: Literal["vote", "mean"] = "vote",
    batch_size: int = 64,
    **options: Any,
) -> list[EnsembleAnswer]:
    """Let N prompts of one task answer every input together.

    With `choices`, the answer is one of them. `"vote"`: each prompt votes for its likeliest choice. `"mean"`: the
    choice of the highest mean log-probability over the prompts wins. A choice's probability is that of its tokens and
    of the end of the text behind them.

    Without, answers are written. `"vote"`: each prompt writes its own, and equal answers count together. `"mean"`: the
    prompts write one answer; each token follows the mean of their log-probabilities.

    The most votes win; among equals the highest mean log-probability over all prompts, then the earliest prompt's
    answer. Equal means: the earliest choice.

    Args:
        model: a causal language model of transformers or an encoder-decoder, or one that PEFT wraps.
        tokenizer: its tokenizer.
        prompts: one or more; None among them is the frozen model, and a tuple of prompts their join (see `join`).
        inputs: texts, message lists, or mappings with the columns of the prompts' templates.
        choices: the answers there are, as they are written in the training data.
        how: `"vote"` or `"mean"`.
        batch_size: rows run at once, 1 or more; the prompts of one input write together, even if they are more.
        **options: without choices, anything `model.generate` takes. Answers written together take greedy decoding or
            sampling (`do_sample`, `temperature`, `top_k`, `top_p`), no beams and no several sequences.

    Raises:
        ConfigError: an option that is not possible, or no prompts.
        As `generate`.
    """
    model = unwrapped(model)
    require_generation(model)
    _check(prompts, choices, how, batch_size, options)
    members = joined_rows(model, prompts)
    each = len(members) * len(choices or [""])
    step = max(batch_size // each, 1)
    answers: list[EnsembleAnswer] = []
    with torch.no_grad(), evaluating(model):
        for start in range(0, len(inputs), step):
            group = _Group(model, tokenizer, members, inputs[start : start + step], batch_size)
            if choices is not None:
                answers += group.choose(choices, how)
            elif how == "vote":
                answers += group.vote(options)
            else:
                answers += group.write(options)
    return answers


class _Group:
    """Some inputs, each under every prompt: row `g * N + n` is input g under prompt n."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[SoftPrompt | None],
        inputs: Sequence[Item],
        limit: int,
    ) -> None:
        self.model, self.tokenizer, self.prompts, self.limit = model, tokenizer, prompts, limit
        self.rows = list(prompts) * len(inputs)
        items = [item for item in inputs for _ in prompts]
        both = model.config.is_encoder_decoder
        self.batch = encode(tokenizer, items, self.rows, spec=ModelSpec.of(model), complete=both)
        self.filler = filler_id(tokenizer)

    def choose(self, choices: Sequence[str], how: str) -> Iterator[EnsembleAnswer]:
        """The best of the choices, for every input."""
        ids = [self._ids(choice) for choice in choices]
        every = [ids] * (len(self.rows) // len(self.prompts))
        for scores in self._scores(every):
            means = dict(zip(choices, scores.mean(0).tolist(), strict=True))
            votes = [choices[best] for best in scores.argmax(1).tolist()]
            winner = max(choices, key=means.__getitem__) if how == "mean" else _winner(votes, means)
            yield EnsembleAnswer(winner, dict(Counter(votes).most_common()), means)

    def vote(self, options: Mapping[str, Any]) -> Iterator[EnsembleAnswer]:
        """Every prompt writes an answer, for every input; the most frequent wins."""
        written = self._written(options)
        each = len(written) // (len(self.rows) // len(self.prompts))
        groups = [written[start : start + each] for start in range(0, len(written), each)]
        texts = [[self._text(ids) for ids in group] for group in groups]
        # Answers may be spelt with different tokens; the first spelling stands for the text.
        distinct = [dict(zip(reversed(t), reversed(g), strict=True)) for t, g in zip(texts, groups, strict=True)]
        scored = self._scores([list(answers.values()) for answers in distinct])
        for votes, answers, scores in zip(texts, distinct, scored, strict=True):
            means = dict(zip(answers, scores.mean(0).tolist(), strict=True))
            yield EnsembleAnswer(_winner(votes, means), dict(Counter(votes).most_common()), means)

    def write(self, options: Mapping[str, Any]) -> Iterator[EnsembleAnswer]:
        """The prompts write one answer, for every input."""
        written = self._written(jointly(self.model, len(self.prompts), options))[:: len(self.prompts)]
        for ids, scores in zip(written, self._scores([[ids] for ids in written]), strict=True):
            yield EnsembleAnswer(self._text(ids), {}, {self._text(ids): float(scores.mean())})

    def _ids(self, choice: str) -> list[int]:
        """A choice as it is learned: with the end of the text, behind an encoder with all special tokens."""
        if self.model.config.is_encoder_decoder:
            return list(complete_row(self.tokenizer, choice).ids)
        return [*text_ids(self.tokenizer, choice), *eos_ids(self.tokenizer)]

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def _written(self, options: Mapping[str, Any]) -> list[list[int]]:
        """What every row writes, up to and with its end-of-text token."""
        new = generate_ids(self.model, self.rows, self.batch, filler=self.filler, **options)
        stops = asked(self.model, options, "eos_token_id")
        ends = {stops} if isinstance(stops, int) else set(stops or ())
        return [row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))] for row in new.tolist()]

    def _scores(self, answers: Sequence[Sequence[Sequence[int]]]) -> Iterator[Float[Tensor, "N _A"]]:
        """For every input the log-probability of each of its answers under every prompt."""
        width = len(self.prompts)
        pairs = [(row, ids) for row in range(len(self.rows)) for ids in answers[row // width]]
        scores = torch.cat([self._following(pairs[i : i + self.limit]) for i in range(0, len(pairs), self.limit)])
        for each in answers:
            yield scores[: width * len(each)].unflatten(0, (width, len(each)))
            scores = scores[width * len(each) :]

    def _following(self, pairs: Sequence[tuple[int, Sequence[int]]]) -> Float[Tensor, " B"]:
        """The same of the answer behind the row, for every pair of the two."""
        rows = [row for row, _ in pairs]
        batch, chosen = self.batch.rows(rows), [self.rows[row] for row in rows]
        return log_likelihoods(self.model, chosen, batch, [ids for _, ids in pairs], self.filler)


def _winner(votes: Sequence[str], means: Mapping[str, float]) -> str:
    counts = Counter(votes)
    # Of equals `max` takes the first, and the votes stand in the order of the prompts.
    return max(votes, key=lambda answer: (counts[answer], means[answer]))


def _check(
    prompts: Sequence[object], choices: Sequence[str] | None, how: str, batch_size: int, options: Mapping[str, Any]
) -> None:
    def require(holds: bool, expected: str, got: str, do: str) -> None:
        if not holds:
            raise ConfigError(expected=expected, got=got, do=do)

    require(bool(prompts), "at least one prompt", "none", "pass a list of prompts")
    require(how in ("vote", "mean"), "how='vote' or how='mean'", repr(how), "choose one of the two")
    require(batch_size >= 1, "batch_size of 1 or more", str(batch_size), "use the default, 64")
    if choices is not None:
        distinct = bool(choices) and all(choices) and len(set(choices)) == len(choices)
        require(distinct, "different choices, none of them empty", repr(list(choices)[:8]), "name every choice once")
        require(not options, "no options of generation with choices", ", ".join(options), "leave them out")
