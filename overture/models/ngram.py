"""The baseline that `tiny` has to beat: a modified Kneser-Ney model over the same tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

Int = npt.NDArray[np.int64]
Float = npt.NDArray[np.float64]


class _Order:
    """Counts of all n-grams of one length, each n-gram a number of `bits` bits per token."""

    def __init__(self, codes: Int, counts: Int, bits: int) -> None:
        self.codes, self.counts = codes, counts
        frequency = [int((counts == i).sum()) for i in range(1, 5)]
        ratio = frequency[0] / (frequency[0] + 2 * frequency[1]) if frequency[0] and frequency[1] else 0.5
        # Discounts of counts 0, 1, 2, and 3 or more (Chen and Goodman 1999, equation 26).
        self.discount = np.zeros(4)
        for i in (1, 2, 3):
            n, m = frequency[i - 1], frequency[i]
            self.discount[i] = np.clip(i - (i + 1) * ratio * m / n, 0.1, i) if n else 0.5 * i
        self.contexts, where = np.unique(codes >> bits, return_inverse=True)
        self.totals = np.bincount(where, counts)
        self.reserved = np.bincount(where, self.discount[np.minimum(counts, 3)])

    def interpolate(self, grams: Int, bits: int, lower: Float) -> Float:
        """Probabilities of the last tokens of n-grams, given those of the next shorter n-grams."""
        context, known = _find(self.contexts, grams >> bits)
        gram, seen = _find(self.codes, grams)
        counts = np.where(seen, self.counts[gram], 0)
        own = counts - self.discount[np.minimum(counts, 3)]
        mixed = (own + self.reserved[context] * lower) / self.totals[context]
        return np.where(known, mixed, lower)


def _find(table: Int, wanted: Int) -> tuple[Int, npt.NDArray[np.bool_]]:
    """Positions of numbers in a sorted table, and whether they are there."""
    index = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
    return index, table[index] == wanted


class KneserNey:
    """Interpolated modified Kneser-Ney, properly normalised.

    Every document starts after `bos`, which is context and never predicted. Below the longest n-grams, an n-gram
    counts the different tokens seen before it; at a document's start, where there are none, it counts itself.
    Source: Chen and Goodman, An Empirical Study of Smoothing Techniques for Language Modeling, 1999.
    """

    def __init__(self, documents: Iterable[Sequence[int]], *, vocab_size: int, bos: int, order: int = 5) -> None:
        """Count n-grams.

        Args:
            documents: token ids of each training document, without `bos`.
            vocab_size: number of distinct ids; `order` of them must fit in 63 bits.
            bos: id of the token that every document starts after.
            order: length of the longest n-grams.
        """
        self.bits = max(1, (vocab_size - 1).bit_length())
        if self.bits * order > 63:
            raise ValueError(f"{order}-grams over {vocab_size} tokens don't fit in 63 bits")
        self.vocab_size, self.bos = vocab_size, bos
        flat = np.concatenate([np.array([bos, *ids], dtype=np.int64) for ids in documents])
        grams, starts = flat, flat == bos
        raw: list[tuple[Int, Int]] = []
        for size in range(1, order + 1):
            if size > 1:
                grams = (grams[:-1] << self.bits) | flat[size - 1 :]
            # An n-gram crosses documents when it has `bos` anywhere but in front.
            inside = np.ones(len(grams), dtype=bool)
            for back in range(1 if size > 1 else 0, size):
                inside &= ~starts[back : back + len(grams)]
            raw.append(np.unique(grams[inside], return_counts=True))
        self.orders: list[_Order] = []
        for size in range(1, order + 1):
            codes, counts = raw[size - 1]
            if size < order:
                types, kinds = np.unique(raw[size][0] & ((1 << self.bits * size) - 1), return_counts=True)
                index, extended = _find(types, codes)
                counts = np.where(extended, kinds[index], counts)
            self.orders.append(_Order(codes, counts.astype(np.int64), self.bits))

    def next_token(self, context: Sequence[int]) -> Float:
        """Probabilities of every token after a context, `[vocab_size]`."""
        every = np.arange(self.vocab_size, dtype=np.int64)
        history = [self.bos, *context][-(len(self.orders) - 1) :] if len(self.orders) > 1 else []
        return self._mix(every, [np.full_like(every, token) for token in reversed(history)])

    def probabilities(self, ids: Sequence[int]) -> Float:
        """Probability of each token of a document, given those before it, `[len(ids)]`."""
        row = np.array([self.bos, *ids], dtype=np.int64)
        index = np.arange(1, len(row))
        before = [np.where(index >= back, row[index - back], -1) for back in range(1, len(self.orders))]
        return self._mix(row[1:], before)

    def _mix(self, tokens: Int, before: list[Int]) -> Float:
        """Interpolate from single tokens up; `before` has the last token first, -1 where the document starts."""
        p = np.full(len(tokens), 1.0 / self.vocab_size)
        grams, usable = tokens, np.ones(len(tokens), dtype=bool)
        for size, order in enumerate(self.orders):
            if size > len(before):
                break
            if size > 0:
                usable &= before[size - 1] >= 0
                grams = grams | (np.maximum(before[size - 1], 0) << self.bits * size)
            p = np.where(usable, order.interpolate(grams, self.bits, p), p)
        return p
