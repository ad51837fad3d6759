"""What every cell of the matrix stands on: rows of all kinds, made of words, and the plain model reading those words.

The oracle. Every prompt here is made of words: virtual tokens are the words' embeddings, a prefix is the keys and
values that the words alone leave in the plain model, block inputs are what enters each block there. A row under its
prompt must then be the plain model with the words in front of (or inside) the text: that row alone, without padding,
without a cache, without Overture. Three things need a word:

- A sliding window would hide the words from late text, a prefix stays visible: the plain model then gets the same
  policy as an explicit mask.
- An encoder's words would see the text behind them, a prefix does not: again an explicit mask.
- In a hybrid the words would reach the text through convolutions, too: there the plain model finds the words' keys and
  values in its cache.

Shape suffixes: P words, T text, N words and text, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from overture import dispatch
from overture.prompt import BlockInputs, KVPrefix, VirtualTokens
from overture.runtime.encode import Encoded
from overture.spec import ModelSpec, attention_modules, backbone, block_modules
from tests.matrix.families import VOCAB, WINDOW, Family

__all__ = ["Batch", "Bench", "Row", "laid", "row_of"]

Value = VirtualTokens | KVPrefix | BlockInputs | None


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """A text and the words of its prompt."""

    kind: str
    """`prefix`, `leading`, `inside`, `deep`, or `none`."""
    words: Tensor
    text: Tensor
    at: tuple[int, ...] = ()
    """For tokens inside the text: before which token each of them stands."""
    source: Tensor | None = None
    """What the encoder of an encoder-decoder reads; `text` is what its decoder does."""
    parts: tuple[str, ...] | None = None
    """The parts of an encoder-decoder that a prefix is for; None for all."""

    def longer(self, tokens: Tensor) -> Row:
        """The same row with more text behind it."""
        return replace(self, text=torch.cat([self.text, tokens]))


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded rows, and where each one's text stands in what the model says."""

    encoded: Encoded
    places: list[Tensor]
    width: int
    """Positions per row, before anything is generated."""
    decoded: Tensor | None = None
    """The decoder's ids, behind an encoder."""

    @property
    def asked(self) -> dict[str, Tensor]:
        """What a caller passes to `generate`."""
        return {"input_ids": self.encoded.input_ids, "attention_mask": self.encoded.attention_mask}

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a caller passes to the model."""
        return self.asked if self.decoded is None else self.asked | {"decoder_input_ids": self.decoded}


class Bench:
    """One family's model, its rows, and what the plain model says to each."""

    sides: tuple[str, ...] = ("right", "left")
    """Where rows may be padded; on the last one to generate."""

    def __init__(self, family: Family, model: PreTrainedModel | None = None) -> None:
        self.family = family
        self.model = family.build() if model is None else model
        self.spec = ModelSpec.of(self.model)
        self.mixed = self._mixed()
        self._said: dict[Any, Any] = {}

    def rows(self, kind: str) -> list[Row]:
        """One row of a kind for every length of the matrix, and one without a prompt."""
        return [row_of(kind, length, text) for length, text in ((7, 9), (33, 4), (1, 6))] + [row_of("none", 0, 7)]

    def _mixed(self) -> list[Row]:
        """All kinds and lengths, and nothing, side by side."""
        rows = [row_of("leading", 7, 9), row_of("none", 0, 6), row_of("inside", 7, 8), row_of("leading", 33, 5)]
        if self.family.no_prefix:
            return rows
        return [
            *rows,
            row_of("prefix", 33, 7),
            row_of("deep" if self.family.deep else "prefix", 7, 3),
            row_of("prefix", 1, 4),
        ]

    @cached_property
    def single(self) -> Bench:
        """The same family in fp32."""
        return type(self)(self.family, self.family.build(torch.float32))

    @cached_property
    def eager(self) -> Bench:
        """The same family with eager attention, in fp32."""
        return type(self)(self.family, self.family.build(torch.float32, "eager"))

    def opening(self, rows: Sequence[Row]) -> Sequence[Row]:
        """The rows as `generate` starts from them."""
        return rows

    # How a row is laid out

    def runs_ahead(self, row: Row) -> bool:
        """True if the row's words stand before the text, and not in the input."""
        return row.kind in ("prefix", "deep") or (row.kind == "leading" and self.spec.runs_ahead)

    def before(self, row: Row) -> tuple[int, ...]:
        """Before which token of the text each word stands that takes a place in the input."""
        if row.kind == "none" or self.runs_ahead(row):
            return ()
        return (0,) * len(row.words) if row.kind == "leading" else row.at

    def batch(self, rows: Sequence[Row], side: str) -> Batch:
        """Rows padded on one side, as `overture.encode` does it."""
        placed = [laid(row.text, self.before(row)) for row in rows]
        width = max(len(ids) for ids, _ in placed)
        filler = self.model.config.get_text_config().pad_token_id or 0
        ids, slots = torch.full((len(rows), width), filler), torch.full((len(rows), width), -1)
        mask, places = torch.zeros_like(ids), []
        for number, (row, slot) in enumerate(placed):
            start = width - len(row) if side == "left" else 0
            window = slice(start, start + len(row))
            ids[number, window] = torch.where(slot >= 0, filler, row)
            slots[number, window], mask[number, window] = slot, 1
            places.append(start + torch.nonzero(slot < 0)[:, 0])
        return Batch(Encoded(ids, mask, slots if (slots >= 0).any() else None), places, width)

    # Prompts made of words

    def embedded(self, words: Tensor) -> Tensor:
        """The words' embeddings."""
        with torch.no_grad():
            return self.model.get_input_embeddings()(words[None])[0].detach()

    def value(self, row: Row, embeddings: Tensor | None = None) -> Value:
        """The row's prompt, differentiable in the words' embeddings if they are given."""
        if row.kind == "none":
            return None
        embedded = self.embedded(row.words) if embeddings is None else embeddings
        if row.kind in ("leading", "inside"):
            return VirtualTokens(embedded)
        with torch.set_grad_enabled(embeddings is not None):
            return self._prefix(row, embedded) if row.kind == "prefix" else self._block_inputs(row, embedded)

    def values(self, rows: Sequence[Row], dtype: torch.dtype | None = None) -> list[Value]:
        """Every row's prompt, on request in another precision than the model's."""
        values = [self.value(row) for row in rows]
        return values if dtype is None else [_cast(value, dtype) for value in values]

    def _alone(self, row: Row, embedded: Tensor, **options: Any) -> None:
        """The words and nothing else through the plain model."""
        with self._written(embedded, torch.arange(len(embedded))):
            backbone(self.model)(input_ids=_ids(row)[None], use_cache=False, **options)

    def _prefix(self, row: Row, embedded: Tensor) -> KVPrefix:
        recorder = _Recorder()
        self._alone(row, embedded, **{dispatch.KEYWORD: recorder})
        return KVPrefix(tuple(recorder.keys), tuple(recorder.values))

    def _block_inputs(self, row: Row, embedded: Tensor) -> BlockInputs:
        seen: list[Tensor] = []

        def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])

        with ExitStack() as stack:
            for block in dict.fromkeys(block_modules(self.model, self.spec.layers)):
                stack.callback(block.register_forward_pre_hook(note, with_kwargs=True).remove)
            self._alone(row, embedded)
        return BlockInputs(torch.cat(seen))

    # The plain model

    def plain(self, row: Row, embeddings: Tensor | None = None) -> Tensor:
        """Logits [T, V] of the plain model at the row's text, with the row's words in the context."""
        embedded = self.embedded(row.words) if embeddings is None else embeddings
        if self.family.hybrid and row.kind in ("prefix", "deep"):
            return self._cached(row, embedded)
        ahead = len(row.words) if self.runs_ahead(row) else 0
        ids, slots = self._input(row, ahead)
        with self._written(embedded, slots), torch.set_grad_enabled(embeddings is not None):
            logits = self.model(input_ids=ids[None], use_cache=False, **self._seen(ahead, len(ids))).logits[0]
        return logits[slots < 0]

    def _input(self, row: Row, ahead: int) -> tuple[Tensor, Tensor]:
        """Ids of words and text, and for each position -1 or the number of the word whose embedding goes there."""
        ids, slots = laid(row.text, (0,) * ahead or self.before(row))
        return torch.where(slots >= 0, _ids(row)[slots.clamp(min=0)], ids) if len(row.words) else ids, slots

    def said(self, row: Row) -> Tensor:
        """`plain`, computed once per row."""
        key = id(row)
        if key not in self._said:
            self._said[key] = (row, self.plain(row))
        return self._said[key][1]

    def greedy(self, row: Row, count: int) -> Tensor:
        """The plain model's most likely continuation, each step from the start."""
        key = (id(row), "greedy", count)
        if key not in self._said:
            longer = row
            for _ in range(count):
                longer = longer.longer(self.plain(longer)[-1:].argmax(-1))
            self._said[key] = (row, longer.text[-count:])
        return self._said[key][1]

    def _cached(self, row: Row, embedded: Tensor) -> Tensor:
        prefix, past = self._prefix(row, embedded), DynamicCache(config=self.model.config)
        indices = [m.layer_idx for m in attention_modules(self.model, self.spec.layers)]
        for index, key, value in zip(indices, prefix.keys, prefix.values, strict=True):
            past.update(key[None], value[None], index)
        positions = torch.arange(len(row.words), len(row.words) + len(row.text))[None]
        with torch.set_grad_enabled(embedded.requires_grad):
            return self.model(input_ids=row.text[None], position_ids=positions, past_key_values=past).logits[0]

    @contextmanager
    def reading(self, row: Row) -> Iterator[dict[str, Tensor]]:
        """The plain model prepared to generate from what it is given here, without a cache, the row's words in it."""
        ahead = len(row.words) if self.runs_ahead(row) else 0
        ids, slots = self._input(row, ahead)

        def mask(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            length = (args[0] if args else kwargs["input_ids"]).shape[1]
            return args, kwargs | self._seen(ahead, length)

        handle = backbone(self.model).register_forward_pre_hook(mask, with_kwargs=True)
        try:
            with self._written(self.embedded(row.words), slots):
                yield {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
        finally:
            handle.remove()

    @contextmanager
    def _written(self, embedded: Tensor, slots: Tensor) -> Iterator[None]:
        """The words' embeddings over the places of the input."""
        if not len(embedded):
            yield
            return

        def write(module: Any, args: Any, output: Tensor) -> Tensor:
            places = torch.nn.functional.pad(slots, (0, output.shape[1] - len(slots)), value=-1)
            return torch.where((places >= 0)[:, None], embedded[places.clamp(min=0)], output)

        handle = self.model.get_input_embeddings().register_forward_hook(write)
        try:
            yield
        finally:
            handle.remove()

    def _seen(self, ahead: int, length: int) -> dict[str, Any]:
        """An explicit mask where words ahead of the text are seen otherwise than words of the text."""
        encoder = self.family.kind == "encoder"
        if not ahead or not (encoder or self.family.sliding):
            return {}
        query, key = torch.arange(length)[:, None], torch.arange(length)[None]
        apart = (query - key).abs()
        full = (query >= ahead) | (key < ahead) if encoder else key <= query
        near = full & (apart <= WINDOW // 2 if encoder else apart < WINDOW)
        masks = {"full_attention": full, "sliding_attention": near | ((query >= ahead) & (key < ahead))}
        masks = {name: self._additive(mask)[None, None] for name, mask in masks.items()}
        if len(set(getattr(self.model.config, "layer_types", None) or ["one"])) > 1:
            return {"attention_mask": masks}
        return {"attention_mask": masks["sliding_attention" if self.family.sliding else "full_attention"]}

    def _additive(self, seen: Tensor) -> Tensor:
        lowest = torch.finfo(self.model.dtype).min
        return torch.zeros(seen.shape, dtype=self.model.dtype).masked_fill(~seen, lowest)


def _ids(row: Row) -> Tensor:
    """What models that read ids beside embeddings (Gemma 3n and 4) find at a word: virtual tokens have no ids."""
    return row.words if row.kind in ("prefix", "deep") else torch.zeros_like(row.words)


class _Recorder:
    """An attention handler that notes the keys and values of one row."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def attend(
        self, inner: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> Any:
        self.keys.append(key[0])
        self.values.append(value[0])
        return inner(module, query, key, value, attention_mask, **kwargs)


def _cast(value: Value, dtype: torch.dtype) -> Value:
    if value is None:
        return None
    return BlockInputs(value.hidden.to(dtype)) if isinstance(value, BlockInputs) else value.map(lambda t: t.to(dtype))


def row_of(kind: str, length: int, text: int) -> Row:
    generator = torch.Generator().manual_seed(1000 * length + text)
    words = torch.randint(3, VOCAB, (length,), generator=generator)
    at = sorted(torch.randint(0, text, (length,), generator=generator).tolist()) if kind == "inside" else ()
    return Row(kind, words, torch.randint(3, VOCAB, (text,), generator=generator), tuple(at))


def laid(text: Tensor, before: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Ids with a zero before token `before[i]` for word i, and -1 or the word's number for every position."""
    ids, slots = [], []
    for position in range(len(text) + 1):
        for number in (number for number, at in enumerate(before) if at == position):
            ids.append(0)
            slots.append(number)
        if position < len(text):
            ids.append(int(text[position]))
            slots.append(-1)
    return torch.tensor(ids), torch.tensor(slots)
