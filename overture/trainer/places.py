"""Places in the input for virtual tokens that cannot run ahead of the text.

Other loops make rows without them. So the rows of a batch are widened on their way into the model, behind the special
tokens in front ([CLS] stays the first), and the answers about each token are narrowed on their way out: the loop sees
rows, labels and logits as it made them.

Shape suffixes: B rows, T text, P virtual tokens, W = T + P.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from overture.errors import ConfigError
from overture.runtime.encode import Encoded
from overture.runtime.tokens import leading_specials, place_id
from overture.spec import task_of

__all__ = ["Opened", "Places"]

_SPANS = ("start_positions", "end_positions")
_NO_LABEL = -100


class Places:
    """Makes places for P virtual tokens in every row of a model's inputs.

    Args:
        model: the base model.
        tokenizer: its tokenizer, which knows the special tokens in front of a text.
        length: P.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        self.length = length
        # Labels and answers of an encoder-decoder are the decoder's, and those of a classifier stand for whole rows.
        self.by_token = not model.config.is_encoder_decoder and task_of(model) != "sequence-classification"
        self.shifts_labels = getattr(model, "loss_type", None) == "ForCausalLM"
        self.specials = leading_specials(tokenizer)
        self.place_id = place_id(tokenizer)

    def open(self, inputs: Mapping[str, Any]) -> Opened:
        """The inputs with places, and what is needed to close them again.

        Raises:
            ConfigError: the inputs are not token ids with a mask of two dimensions, or are packed.
        """
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        wrong = [name for name in ("inputs_embeds", "position_ids", "past_key_values") if inputs.get(name) is not None]
        if ids is None or ids.ndim != 2 or wrong or (mask is not None and mask.shape != ids.shape):
            raise ConfigError(
                expected="rows of input_ids, and a mask of their shape, to make places for virtual tokens in",
                got=", ".join(wrong) or ("other shapes" if ids is not None else "no input_ids"),
                do="pass unpacked rows of token ids, or use PrefixTuning, which needs no places",
            )
        mask = torch.ones_like(ids) if mask is None else mask
        layout = _Layout.behind(self._front(ids, mask), ids.shape[1], self.length)
        opened = {"input_ids": layout.widened(ids, self.place_id), "attention_mask": layout.widened(mask, 1)}
        types, labels = inputs.get("token_type_ids"), inputs.get("labels")
        if types is not None:
            opened["token_type_ids"] = layout.widened(types, 0)
        if labels is not None and self.by_token:
            opened["labels"] = self._labels(layout, labels)
        for name in _SPANS:
            if inputs.get(name) is not None:
                opened[name] = layout.moved(inputs[name])
        batch = Encoded(opened["input_ids"], opened["attention_mask"], layout.slots)
        return Opened(dict(inputs) | opened, batch, layout if self.by_token else None)

    def _labels(self, layout: _Layout, labels: Int[Tensor, "B T"]) -> Int[Tensor, "B W"]:
        if self.shifts_labels:
            # Nothing stands before a row's first token, so nothing predicts it; virtual tokens would.
            first = torch.zeros_like(labels, dtype=torch.bool)
            first[:, :1] = layout.kept[:, :1] == self.length
            labels = labels.masked_fill(first, _NO_LABEL)
        return layout.widened(labels, _NO_LABEL)

    def _front(self, ids: Int[Tensor, "B T"], mask: Int[Tensor, "B T"]) -> Int[Tensor, "B 1"]:
        """The column in front of which the places of each row stand."""
        begin = mask.ne(0).int().argmax(dim=1, keepdim=True)
        specials = torch.tensor(self.specials, dtype=ids.dtype, device=ids.device)
        columns = (begin + torch.arange(len(specials), device=ids.device)).clamp(max=ids.shape[1] - 1)
        found: Bool[Tensor, "B 1"] = (ids.gather(1, columns) == specials).all(dim=1, keepdim=True)
        return begin + len(specials) * found.int()


_AT_POSITIONS = ("logits", "start_logits", "end_logits", "last_hidden_state", "hidden_states")
"""Outputs that answer at every position. What is pooled does not; attention weights show the places, too."""


@dataclass(frozen=True, slots=True, eq=False)
class _Layout:
    """Where the columns of a batch go."""

    slots: Int[Tensor, "B W"]
    """-1 for the caller's own, else the index of the virtual token that stands there."""
    source: Int[Tensor, "B W"]
    """The caller's column that each column holds; of any at places."""
    kept: Int[Tensor, "B T"]
    """The column that each of the caller's columns goes to."""

    @classmethod
    def behind(cls, at: Int[Tensor, "B 1"], width: int, length: int) -> _Layout:
        """`length` places before column `at` of each row."""
        column = torch.arange(width + length, device=at.device)
        own = column[:width]
        return cls(
            slots=torch.where((column >= at) & (column < at + length), column - at, -1),
            source=torch.where(column < at, column, (column - length).clamp(min=0)).clamp(max=width - 1),
            kept=torch.where(own < at, own, own + length),
        )

    def widened(self, given: Int[Tensor, "B T"], filler: int) -> Int[Tensor, "B W"]:
        """`given` with `filler` at places."""
        return given.gather(1, self.source).masked_fill(self.slots >= 0, filler)

    def moved(self, positions: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        """Where one position of each row goes; what lies outside the row stays outside."""
        inside = (positions >= 0) & (positions < self.kept.shape[1])
        there = self.kept.gather(1, positions.clamp(0, self.kept.shape[1] - 1)[:, None])[:, 0]
        return torch.where(inside, there, positions + (self.slots.shape[1] - self.kept.shape[1]) * (positions > 0))

    def narrowed(self, value: Any) -> Any:
        """What answers at every position, at the caller's alone; anything else as it is."""
        if isinstance(value, tuple):
            return tuple(map(self.narrowed, value))
        if not isinstance(value, Tensor) or value.shape[:2] != self.slots.shape:
            return value
        index = self.kept.to(value.device).view(*self.kept.shape, *[1] * (value.ndim - 2))
        return value.gather(1, index.expand(-1, -1, *value.shape[2:]))


@dataclass(frozen=True, slots=True, eq=False)
class Opened:
    """Inputs with places, and the way back."""

    inputs: dict[str, Any]
    """The keywords of the forward pass."""
    batch: Encoded
    """The same as a batch of which the places are known."""
    layout: _Layout | None
    """None if the model does not answer at the positions of its input."""

    def close(self, output: Any) -> Any:
        """The model's output without the answers at places."""
        if self.layout is None:
            return output
        if isinstance(output, tuple):
            return self.layout.narrowed(output)
        for name, value in output.items():
            if name in _AT_POSITIONS:
                output[name] = self.layout.narrowed(value)
        return output

    def close_generated(self, output: Any) -> Any:
        """What was generated, behind the caller's own rows."""
        if self.layout is None:
            return output
        if not isinstance(output, Tensor):
            output.sequences = self.close_generated(output.sequences)
            return output
        kept, width = self.layout.kept, self.layout.slots.shape[1]
        own = output.gather(1, kept.repeat_interleave(len(output) // len(kept), dim=0))
        return torch.cat([own, output[:, width:]], dim=1)
