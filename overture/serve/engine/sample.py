"""Choosing the next token of every row. No row's choice depends on another's.

Shape suffixes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from jaxtyping import Float, Int
from torch import Tensor

from overture.serve.requests import Sampling

__all__ = ["Choice", "Chooser", "choose"]


@dataclass(slots=True, eq=False)
class Chooser:
    """What decides a row's tokens: the wishes of its job, its own generator, and what it has chosen so far."""

    sampling: Sampling
    random: Random
    counts: dict[int, int]
    drawn: float | None = None

    @classmethod
    def of(cls, sampling: Sampling) -> Chooser:
        """A row's chooser at the beginning of its answer."""
        return cls(sampling, Random(sampling.seed), {})

    @property
    def number(self) -> float:
        """A number from 0 to 1 for the next token. It stays until that is taken: a step that failed is repeated."""
        if self.drawn is None:
            self.drawn = self.random.random()
        return self.drawn

    @property
    def penalises(self) -> bool:
        """True if it matters what was chosen before."""
        return bool(self.sampling.presence_penalty or self.sampling.frequency_penalty)

    def chosen(self, id: int) -> None:
        """Take note of a token."""
        self.drawn = None
        if self.penalises:
            self.counts[id] = self.counts.get(id, 0) + 1


@dataclass(slots=True, frozen=True)
class Choice:
    """A row's next token."""

    id: int
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()
    finite: bool = True
    """False if the model's answer is not made of numbers."""


def choose(logits: Float[Tensor, "B V"], choosers: Sequence[Chooser]) -> list[Choice]:
    """One token per row."""
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    scores = _adjusted(logits, choosers)
    best, ids = scores.max(dim=1)
    finite, chosen = best.isfinite().tolist(), ids.tolist()
    drawing = [i for i, chooser in enumerate(choosers) if chooser.sampling.temperature > 0 and finite[i]]
    if drawing:
        for i, id in zip(drawing, _drawn(scores, drawing, choosers), strict=True):
            chosen[i] = id
    choices = [Choice(id, finite=fine) for id, fine in zip(chosen, finite, strict=True)]
    for i, logprob, alternatives in _logprobs(logits, chosen, choosers):
        choices[i] = Choice(chosen[i], logprob, alternatives, finite[i])
    return choices


def _adjusted(logits: Float[Tensor, "B V"], choosers: Sequence[Chooser]) -> Float[Tensor, "B V"]:
    """The logits with every row's bias and penalties."""
    rows: list[int] = []
    ids: list[int] = []
    amounts: list[float] = []
    for i, chooser in enumerate(choosers):
        wishes = chooser.sampling
        added = dict(wishes.logit_bias)
        for id, count in chooser.counts.items():
            added[id] = added.get(id, 0.0) - wishes.presence_penalty - count * wishes.frequency_penalty
        rows += [i] * len(added)
        ids += added.keys()
        amounts += added.values()
    if not rows:
        return logits
    at = torch.tensor(rows, device=logits.device), torch.tensor(ids, device=logits.device)
    return logits.index_put(at, torch.tensor(amounts, dtype=logits.dtype, device=logits.device), accumulate=True)


def _drawn(scores: Float[Tensor, "B V"], rows: Sequence[int], choosers: Sequence[Chooser]) -> list[int]:
    """A token for each of some rows, drawn by the one number that the row's own generator gives."""
    wishes = [choosers[i].sampling for i in rows]
    chosen = scores if len(rows) == len(scores) else scores[list(rows)]
    # A temperature near zero must not overflow: scores count from the best.
    chosen = chosen - chosen.max(dim=1, keepdim=True).values
    chosen = chosen / torch.tensor([w.temperature for w in wishes], dtype=chosen.dtype, device=chosen.device)[:, None]
    chosen = _likeliest(chosen, [w.top_k for w in wishes])
    weights = _nucleus(chosen.double().softmax(dim=1), [w.top_p for w in wishes])
    sums = weights.cumsum(dim=1)
    whole = sums[:, -1:].contiguous()
    numbers = torch.tensor([choosers[i].number for i in rows], dtype=sums.dtype, device=sums.device)
    at = torch.searchsorted(sums, numbers[:, None] * whole, right=True)[:, 0]
    # Rounding may land behind the last token of any weight.
    last = torch.searchsorted(sums, whole)[:, 0]
    drawn: list[int] = torch.minimum(at, last).tolist()
    return drawn


def _likeliest(scores: Float[Tensor, "B V"], counts: Sequence[int]) -> Float[Tensor, "B V"]:
    """Only the `counts` best scores of each row, and what equals the last of them."""
    vocabulary = scores.shape[1]
    rows = [i for i, count in enumerate(counts) if 0 < count < vocabulary]
    if not rows:
        return scores
    some = scores[rows]
    best = some.topk(max(counts[i] for i in rows), dim=1).values
    least = best.gather(1, _column([counts[i] - 1 for i in rows], best))
    scores = scores.clone()
    scores[rows] = some.masked_fill(some < least, -torch.inf)
    return scores


def _nucleus(weights: Float[Tensor, "B V"], shares: Sequence[float]) -> Float[Tensor, "B V"]:
    """Only the likeliest tokens that together have a share of the weight, and what equals the last of them."""
    rows = [i for i, share in enumerate(shares) if share < 1]
    if not rows:
        return weights
    some = weights[rows]
    best = some.sort(dim=1, descending=True).values
    wanted = torch.tensor([shares[i] for i in rows], dtype=weights.dtype, device=weights.device)[:, None]
    last = (best.cumsum(dim=1) - best < wanted).sum(dim=1, keepdim=True) - 1
    weights = weights.clone()
    weights[rows] = some.masked_fill(some < best.gather(1, last.clamp(min=0)), 0)
    return weights


def _logprobs(
    logits: Float[Tensor, "B V"], chosen: Sequence[int], choosers: Sequence[Chooser]
) -> list[tuple[int, float, tuple[tuple[int, float], ...]]]:
    """For the rows that ask: the log-probability of what was chosen, and the likeliest tokens with theirs."""
    rows = [i for i, chooser in enumerate(choosers) if chooser.sampling.logprobs is not None]
    if not rows:
        return []
    counts = [min(choosers[i].sampling.logprobs or 0, logits.shape[1]) for i in rows]
    found = logits[rows].log_softmax(dim=1)
    own: list[float] = found.gather(1, _column([chosen[i] for i in rows], found))[:, 0].tolist()
    best, ids = (tensor.tolist() for tensor in found.topk(max(counts), dim=1))
    return [
        (row, own[i], tuple(zip(ids[i][:count], best[i][:count], strict=True)))
        for i, (row, count) in enumerate(zip(rows, counts, strict=True))
    ]


def _column(numbers: Sequence[int], like: Tensor) -> Int[Tensor, "B 1"]:
    return torch.tensor(numbers, device=like.device)[:, None]
