"""Choosing tokens. Oracle: transformers' logits warpers, and arithmetic by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from overture.serve.engine.sample import Chooser, choose
from overture.serve.requests import Sampling

LOGITS = torch.randn(1, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.4),
        Sampling(top_k=5),
        Sampling(top_p=0.6),
        Sampling(temperature=1.7, top_k=12, top_p=0.8),
    ],
)
def test_draws_follow_the_distribution_of_transformers_warpers(sampling: Sampling) -> None:
    """6,000 draws: a share's standard error is below 0.0065, so 0.03 is more than four of them."""
    scores = TemperatureLogitsWarper(sampling.temperature)(None, LOGITS)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    wanted = scores.softmax(-1)[0]
    draws = 6_000
    choosers = [Chooser.of(replace(sampling, seed=seed)) for seed in range(draws)]
    drawn = Counter(choice.id for choice in choose(LOGITS.expand(draws, -1), choosers))
    assert set(drawn) <= set(wanted.nonzero()[:, 0].tolist())
    for id, share in enumerate(wanted.tolist()):
        assert drawn[id] / draws == pytest.approx(share, abs=0.03)


def test_a_row_draws_the_same_whoever_else_is_there() -> None:
    rows = torch.randn(30, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wishes = [
        Sampling(seed=i, temperature=(0.0, 0.7, 1.3)[i % 3], top_k=(0, 4)[i % 2], top_p=(1.0, 0.5)[i // 2 % 2])
        for i in range(30)
    ]
    together = [choice.id for choice in choose(rows, [Chooser.of(wish) for wish in wishes])]
    apart = [choose(rows[i : i + 1], [Chooser.of(wish)])[0].id for i, wish in enumerate(wishes)]
    assert together == apart


def test_a_step_that_is_repeated_draws_the_same() -> None:
    chooser = Chooser.of(Sampling(seed=3))
    first = choose(LOGITS, [chooser])[0].id
    assert choose(LOGITS, [chooser])[0].id == first
    chooser.chosen(first)
    numbers = {chooser.number}
    chooser.chosen(first)
    assert chooser.number not in numbers


def test_penalties_and_bias_are_taken_from_the_logits_and_not_from_the_logprobs() -> None:
    logits = torch.tensor([[2.0, 1.5, 1.0, 0.0]], dtype=torch.float64)
    chooser = Chooser.of(
        Sampling(temperature=0, logprobs=2, logit_bias={2: 0.25}, presence_penalty=0.5, frequency_penalty=0.3)
    )
    found = []
    for _ in range(4):
        choice = choose(logits, [chooser])[0]
        chooser.chosen(choice.id)
        found.append(choice)
    # 2.0, 1.5, 1.25; then 1.2, 1.5, 1.25; then 1.2, 0.7, 1.25; then 1.2, 0.7, 0.45
    assert [choice.id for choice in found] == [0, 1, 2, 0]
    wanted = logits.log_softmax(-1)[0]
    assert [choice.logprob for choice in found] == pytest.approx([float(wanted[choice.id]) for choice in found])
    assert found[1].alternatives == ((0, float(wanted[0])), (1, float(wanted[1])))


def test_logprobs_stand_only_where_they_are_asked_for() -> None:
    choosers = [Chooser.of(Sampling(temperature=0, logprobs=asked)) for asked in (None, 0, 3)]
    plain, own, three = choose(LOGITS.expand(3, -1), choosers)
    assert plain.logprob is None
    assert own.logprob == three.logprob == pytest.approx(float(LOGITS.log_softmax(-1).max()))
    assert (len(plain.alternatives), len(own.alternatives), len(three.alternatives)) == (0, 0, 3)


def test_what_is_no_number_is_noticed_in_its_row_alone() -> None:
    logits = LOGITS.repeat(3, 1)
    logits[1, 7] = torch.nan
    choices = choose(logits, [Chooser.of(Sampling(seed=i)) for i in range(3)])
    assert [choice.finite for choice in choices] == [True, False, True]


def test_a_temperature_near_zero_takes_the_best() -> None:
    choosers = [Chooser.of(Sampling(temperature=1e-300, seed=seed)) for seed in range(20)]
    assert {choice.id for choice in choose(LOGITS.expand(20, -1), choosers)} == {int(LOGITS.argmax())}
