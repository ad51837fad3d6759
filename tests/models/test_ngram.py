"""The n-gram baseline. Oracles: the axiom that probabilities sum to one, and the textbook formula with plain dicts."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overture.models.ngram import KneserNey

VOCAB, BOS = 12, 1


def _documents(seed: int, count: int = 30) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.choice((2, 2, 3, 4, 5, 6, 9)) for _ in range(rng.randint(1, 12))] for _ in range(count)]


@given(seed=st.integers(0, 20), context=st.lists(st.integers(2, VOCAB - 1), max_size=6), order=st.integers(1, 5))
def test_probabilities_sum_to_one(seed: int, context: list[int], order: int) -> None:
    model = KneserNey(_documents(seed), vocab_size=VOCAB, bos=BOS, order=order)
    p = model.next_token(context)
    # 12 float64 additions of interpolated ratios.
    assert p.sum() == pytest.approx(1.0, abs=1e-12)
    assert (p > 0).all()


def test_a_document_is_scored_as_its_tokens_one_by_one() -> None:
    model = KneserNey(_documents(1), vocab_size=VOCAB, bos=BOS)
    ids = [2, 3, 2, 9, 11, 4, 2]
    alone = [model.next_token(ids[:i])[token] for i, token in enumerate(ids)]
    np.testing.assert_allclose(model.probabilities(ids), alone, rtol=1e-12)


def test_bigrams_follow_the_formula_of_chen_and_goodman() -> None:
    docs = _documents(2, 60)
    model = KneserNey(docs, vocab_size=VOCAB, bos=BOS, order=2)
    pairs = Counter(pair for ids in docs for pair in zip([BOS, *ids], ids, strict=False))
    kinds = Counter(second for _, second in pairs)

    def discounts(counts: Counter) -> dict[int, float]:
        n = Counter(counts.values())
        y = n[1] / (n[1] + 2 * n[2]) if n[1] and n[2] else 0.5
        return {i: min(max(i - (i + 1) * y * n[i + 1] / n[i], 0.1), i) if n[i] else 0.5 * i for i in (1, 2, 3)}

    def mix(counts: Counter, keys: list, key: object, lower: float) -> float:
        d = discounts(counts)
        total = sum(counts[k] for k in keys)
        own = counts[key] - d[min(counts[key], 3)] if counts[key] else 0.0
        return (own + sum(d[min(counts[k], 3)] for k in keys) * lower) / total

    for first in (BOS, 2, 9):
        for token in (2, 5, 11):
            lower = mix(kinds, list(kinds), token, 1 / VOCAB)
            expected = mix(pairs, [pair for pair in pairs if pair[0] == first], (first, token), lower)
            context = [] if first == BOS else [first]
            assert model.next_token(context)[token] == pytest.approx(expected, rel=1e-12)


def test_too_long_n_grams_are_refused() -> None:
    with pytest.raises(ValueError, match="63 bits"):
        KneserNey([[2]], vocab_size=1 << 20, bos=BOS, order=5)
