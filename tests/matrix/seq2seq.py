"""The bench of encoder-decoders, whose prefixes enter the encoder, the decoder and cross-attention, each or all.

The oracle. Words have no one place in an encoder-decoder, whose prefix enters three parts. So a prefix here is made of
any numbers (a linear map of some words' embeddings), and the plain model attends to it by the definition, written out:
softmax over the scores of prefix and text, the prefix at no position relative to the text. Virtual tokens stand in the
encoder's text, and the plain model gets the same vectors as `inputs_embeds`.

Shape suffixes: P words, N words and text, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from overture import dispatch
from overture.prompt import KVPrefix, VirtualTokens
from overture.spec import attention_modules, backbone
from tests.matrix.bench import Batch, Bench, Row, laid, row_of

__all__ = ["EncoderDecoderBench"]

Attended = Mapping[int, tuple[Tensor, Tensor]]
"""By `id` of an attention module, the prefix it attends to."""


class EncoderDecoderBench(Bench):
    """T5, BART and their like."""

    sides = ("right",)

    def rows(self, kind: str) -> list[Row]:
        """As `Bench.rows`; a prefix for all parts, for the encoder, and for the decoder's two."""
        parts = (None, ("encoder",), ("decoder", "cross")) if kind == "prefix" else (None, None, None)
        rows = [self._row(kind, p, t, part) for (p, t), part in zip(((7, 9), (33, 4), (1, 6)), parts, strict=True)]
        return [*rows, self._row("none", 0, 7)]

    def _mixed(self) -> list[Row]:
        return [
            self._row("leading", 7, 9),
            self._row("none", 0, 6),
            self._row("inside", 7, 8),
            self._row("prefix", 33, 5),
            self._row("prefix", 7, 7, ("cross",)),
            self._row("prefix", 1, 4, ("encoder", "cross")),
        ]

    def _row(self, kind: str, length: int, text: int, parts: tuple[str, ...] | None = None) -> Row:
        row, start = row_of(kind, length, text), torch.tensor([self.model.config.decoder_start_token_id])
        return replace(row, source=row.text, text=torch.cat([start, row.text.flip(0)[: text // 2 + 1]]), parts=parts)

    def opening(self, rows: Sequence[Row]) -> Sequence[Row]:
        """With the decoder at its start."""
        return [replace(row, text=row.text[:1]) for row in rows]

    def runs_ahead(self, row: Row) -> bool:
        """A prefix stands in no input."""
        return row.kind == "prefix"

    def batch(self, rows: Sequence[Row], side: str) -> Batch:
        """Sources padded on one side; the decoder's texts on the right, where causal attention does not look."""
        encoded = super().batch([replace(row, text=row.source) for row in rows], side).encoded
        width = max(len(row.text) for row in rows)
        decoded = torch.stack([pad(row.text, (0, width - len(row.text))) for row in rows])
        return Batch(encoded, [torch.arange(len(row.text)) for row in rows], 1, decoded)

    def _prefix_of(self, row: Row, embedded: Tensor) -> KVPrefix:
        generator = torch.Generator().manual_seed(4)
        pairs = []
        for layer in self.spec.layers_of(row.parts):
            for size in (layer.key_dim, layer.value_dim):
                weight = torch.randn(embedded.shape[1], layer.kv_heads * size, generator=generator, dtype=torch.float64)
                pairs.append((embedded @ weight.to(embedded) / 3).unflatten(1, (layer.kv_heads, size)).transpose(0, 1))
        return KVPrefix(tuple(pairs[0::2]), tuple(pairs[1::2]), row.parts)

    def value(self, row: Row, embeddings: Tensor | None = None) -> VirtualTokens | KVPrefix | None:
        """The row's prompt, differentiable in the words' embeddings if they are given."""
        if row.kind == "none":
            return None
        embedded = self.embedded(row.words) if embeddings is None else embeddings
        return self._prefix_of(row, embedded) if row.kind == "prefix" else VirtualTokens(embedded)

    def plain(self, row: Row, embeddings: Tensor | None = None) -> Tensor:
        """Logits [T, V] of the plain model at what the decoder reads."""
        embedded = self.embedded(row.words) if embeddings is None else embeddings
        with torch.set_grad_enabled(embeddings is not None):
            return self.model(
                inputs_embeds=self._source(row, embedded),
                decoder_input_ids=row.text[None],
                use_cache=False,
                **self._attention(row, embedded),
            ).logits[0]

    @contextmanager
    def reading(self, row: Row) -> Iterator[dict[str, Tensor]]:
        """The plain model prepared to generate from what it is given here."""
        embedded = self.embedded(row.words)
        attention, source = self._attention(row, embedded), self._source(row, embedded)

        def attend(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, attention | kwargs

        with ExitStack() as stack:
            for module in (backbone(self.model), self.model.get_encoder()):
                stack.callback(module.register_forward_pre_hook(attend, with_kwargs=True).remove)
            yield {"inputs_embeds": source, "attention_mask": torch.ones(source.shape[:2], dtype=torch.long)}

    def _source(self, row: Row, embedded: Tensor) -> Tensor:
        """The embedded input of the encoder, the words' embeddings in their places."""
        assert row.source is not None
        ids, slots = laid(row.source, self.before(row))
        text = self.model.get_input_embeddings()(ids).detach()
        return (text if not len(embedded) else torch.where((slots >= 0)[:, None], embedded[slots.clamp(min=0)], text))[
            None
        ]

    def _attention(self, row: Row, embedded: Tensor) -> dict[str, Any]:
        if row.kind != "prefix":
            return {}
        prefix, layers = self._prefix_of(row, embedded), self.spec.layers_of(row.parts)
        modules = attention_modules(self.model, layers)
        pairs = zip(prefix.keys, prefix.values, strict=True)
        return {dispatch.KEYWORD: _Written({id(module): pair for module, pair in zip(modules, pairs, strict=True)})}


class _Written:
    """Attention to a prefix and a text, by its definition."""

    def __init__(self, prefixes: Attended) -> None:
        self.prefixes = prefixes

    def attend(
        self, inner: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> Any:
        if id(module) not in self.prefixes:
            return inner(module, query, key, value, attention_mask, **kwargs)
        scaling = kwargs.get("scaling")
        scaling = query.shape[3] ** -0.5 if scaling is None else scaling
        scores = query @ key.transpose(2, 3) * scaling
        if kwargs.get("position_bias") is not None:
            scores = scores + kwargs["position_bias"]
        if attention_mask is not None:
            seen = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
            scores = scores.masked_fill(~seen, -torch.inf)
        elif module.is_causal and query.shape[2] > 1:
            scores = scores.masked_fill(~torch.ones(scores.shape[2:], dtype=torch.bool).tril(), -torch.inf)
        first, second = self.prefixes[id(module)]
        ahead = query @ first.transpose(1, 2) * scaling
        weights = torch.cat([ahead, scores], dim=3).softmax(3)
        joined = torch.cat([second.expand(len(value), -1, -1, -1), value], dim=2)
        return (weights @ joined).transpose(1, 2).contiguous(), None
