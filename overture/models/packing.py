"""Blocks of token ids: which source comes next, and how documents fill a block."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from overture.models.corpus import Source, endless, load
from overture.models.tokenizer import render

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


def _ids(tokenizer: PreTrainedTokenizerBase, source: Source, data: Path, seed: int) -> Iterator[int]:
    """A source's endless stream of ids: documents, each closed by `<|end|>`, with `<|bos|>` between them."""
    bos = tokenizer.bos_token_id
    # Long texts in file sources are encoded once per pass; caching them would cost more memory than time.
    for document in endless(source, data, seed):
        yield from tokenizer.encode(render(document), add_special_tokens=False)
        yield bos


def blocks(
    tokenizer: PreTrainedTokenizerBase, sources: tuple[Source, ...], data: Path, *, block: int, seed: int
) -> Iterator[list[int]]:
    """Yield blocks of `block + 1` ids (inputs and shifted targets), each from one source drawn by weight."""
    streams = [_ids(tokenizer, source, data, seed) for source in sources]
    rng = Random(seed)
    weights = [source.weight for source in sources]
    while True:
        yield list(islice(rng.choices(streams, weights)[0], block + 1))


class Batches:
    """Batches by step number, so that a resumed run reads what an uninterrupted one would.

    Blocks are a pure function of the seed; skipping ahead re-reads them, at tokenizer speed.
    """

    def __init__(self, found: Iterator[list[int]], rows: int) -> None:
        self.found, self.rows, self.step = found, rows, 0

    def at(self, step: int) -> torch.Tensor:
        """The batch of a step, `[rows, block + 1]`; steps must not go backwards."""
        import torch

        assert step >= self.step, "batches are read forwards only"
        while True:
            batch = list(islice(self.found, self.rows))
            self.step += 1
            if self.step > step:
                return torch.tensor(batch)


def tokenizer_text(
    sources: tuple[Source, ...], data: Path, seed: int = 0, per_source: int = 1_500_000
) -> Iterator[str]:
    """Training text for the tokenizer: an equal number of characters at most from each source."""
    from overture.models.tokenizer import plain

    for source in sources:
        found = load(source, data)
        Random(seed).shuffle(found)
        left = per_source
        for document in found:
            text = plain(document)
            yield text
            left -= len(text)
            if left < 0:
                break
