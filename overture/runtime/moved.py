"""Text that stands behind a prefix where the model takes no positions: an encoder-decoder's decoder, as PEFT runs it.

There Overture's own prefixes stand at no position. One that counts (`KVPrefix.counted`) moves the decoder's text behind
itself: where positions are embedded (BART) the text gets later ones, and where attention adds a bias by distance (T5)
the prefix gets that of its distance.

Shape suffixes: B rows, H heads, T queries, P longest prefix.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from overture.errors import ContextLengthError, UnsupportedModelError
from overture.spec import ModelSpec

__all__ = ["Moved", "bias_module", "position_modules"]

_START = "past_key_values_length"


@dataclass(frozen=True, slots=True, eq=False)
class Moved:
    """How far the decoder's text stands behind each row's prefix, in one forward pass."""

    offsets: Sequence[int]
    """[B]: length of the row's prefix if it counts, else 0."""
    start: int
    """Positions of the text before this pass, which a cache holds."""
    biased: nn.Module | None
    """The attention module that makes the bias of positions; None if none does."""

    def check(self, spec: ModelSpec, length: int, positions: Sequence[nn.Module]) -> None:
        """Raise unless the text of this pass can be moved, and then has positions."""
        if not positions and self.biased is None:
            raise UnsupportedModelError(
                expected="a decoder that embeds positions or has a bias of them, for a prefix that counts as positions",
                got=f"{spec.base.architecture}, which has neither",
                do="tune a prefix for it with `overture tune --method prefix`",
            )
        count = self.start + length + max(self.offsets)
        if spec.learned_positions and spec.max_positions is not None and count > spec.max_positions:
            raise ContextLengthError(
                expected=f"virtual tokens and text within the decoder's {spec.max_positions} positions",
                got=f"{count} positions",
                do="shorten the text or use a prompt with fewer virtual tokens",
            )

    def bias(self, module: nn.Module, text: Float[Tensor, "#B H T _S"], longest: int) -> Float[Tensor, "B H T _PS"]:
        """The bias over prefix and text, from that over the text; a prefix that does not count has none."""
        queries = text.shape[2]
        # In most models the first layer makes it for all; in some each has its own (UMT5).
        source: Any = module if getattr(module, "has_relative_attention_bias", False) else self.biased
        made: dict[int, Tensor] = {0: text.new_zeros(1, text.shape[1], queries, longest)}
        for offset in set(self.offsets) - {0}:
            own = source.compute_bias(queries, offset, device=text.device, past_seen_tokens=offset + self.start)
            made[offset] = pad(own.to(text), (0, longest - offset))
        prefix = torch.cat([made[offset] for offset in self.offsets])
        return torch.cat([prefix, text.expand(len(prefix), -1, -1, -1)], dim=-1)

    def embedded(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Float[Tensor, "_B T hidden"]
    ) -> Float[Tensor, "B T hidden"]:
        """What a module that embeds positions gives, every row at its own."""
        made = {0: output}
        for offset in set(self.offsets) - {0}:
            call = inspect.signature(module.forward).bind(*args, **kwargs)
            name = "position_ids" if call.arguments.get("position_ids") is not None else _START
            call.arguments[name] = call.arguments.get(name, 0) + offset
            made[offset] = module.forward(*call.args, **call.kwargs)
        rows = [made[offset] for offset in self.offsets]
        return torch.cat([each[i : i + 1] if len(each) > 1 else each for i, each in enumerate(rows)])


def position_modules(decoder: PreTrainedModel) -> list[nn.Module]:
    """The modules of a decoder that embed positions they are told."""
    tables = (module for module in decoder.modules() if isinstance(module, nn.Embedding))
    return [table for table in tables if {"position_ids", _START} <= inspect.signature(table.forward).parameters.keys()]


def bias_module(modules: Sequence[nn.Module]) -> nn.Module | None:
    """Of a decoder's attention modules the one that makes the bias of positions."""
    found = (module for module in modules if getattr(module, "has_relative_attention_bias", False))
    return next((module for module in found if hasattr(cast(Any, module), "compute_bias")), None)
