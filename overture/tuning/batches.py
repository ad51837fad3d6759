"""Which rows stand in which batch: a pure function of seed and batch number, so that a run can resume anywhere."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache

from overture.tuning.example import Example

__all__ = ["BatchOrder"]

_BUCKET = 32


class BatchOrder:
    """Endless batches over shuffled epochs, rows of similar length together.

    Each epoch is shuffled, cut into buckets of 32 batches, sorted by length inside a bucket, cut into batches, and the
    batches are shuffled. Every row appears once an epoch; the last batch of an epoch may be smaller.
    """

    def __init__(self, examples: Sequence[Example], batch_size: int, seed: int) -> None:
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.per_epoch = -(-len(examples) // batch_size)
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def batch(self, number: int) -> list[Example]:
        """Batch `number`, from 0."""
        epoch, place = divmod(number, self.per_epoch)
        return [self.examples[i] for i in self._epoch(epoch)[place]]

    def _make_epoch(self, epoch: int) -> list[list[int]]:
        order = list(range(len(self.examples)))
        shuffle = random.Random(f"{self.seed}/{epoch}").shuffle
        shuffle(order)
        span = _BUCKET * self.batch_size
        batches: list[list[int]] = []
        for start in range(0, len(order), span):
            bucket = sorted(order[start : start + span], key=lambda i: len(self.examples[i].ids))
            batches += [bucket[i : i + self.batch_size] for i in range(0, len(bucket), self.batch_size)]
        shuffle(batches)
        return batches
