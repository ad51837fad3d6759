"""Prefix Tuning: keys and values of P virtual tokens for every attention layer (arXiv:2101.00190).

Shape suffixes: U prompts, P virtual tokens, C channels (all layers, keys and values, heads and sizes side by side).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from overture.errors import ConfigError
from overture.methods.base import FrozenModel, Method, Prepared, PromptModule, Tokens, check_count, seeded
from overture.methods.init import prompt_length, random_like, reference_tokens, start_tokens
from overture.methods.offsets import FreeOffset, MLPOffset, Offset, ResidualOffset
from overture.prompt import KVPrefix
from overture.spec import AttentionLayer, ModelSpec

__all__ = ["PrefixModule", "PrefixTuning"]

_PARTS = ("encoder", "decoder", "cross")


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixTuning(Method):
    """A soft prompt for every transformer block, which attention sees in front of the text."""

    name: ClassVar[str] = "prefix"

    reparameterization: bool = True
    """Train through a small fully connected network, which is folded away on save."""
    reparameterization_hidden: int = 512
    """Hidden size of that network, 1 or more."""
    residual: bool = True
    """Beside the network, every virtual token learns an offset of its own; False for the network alone, as in the
    paper."""
    dropout: float = 0.0
    """Dropout on the keys and values, 0 up to (not including) 1; 0 to 0.1 is usual."""
    parts: tuple[str, ...] | None = None
    """Of an encoder-decoder, the parts with a prefix: `"encoder"`, `"decoder"` (its self-attention), `"cross"`.
    None: all of them."""

    def __post_init__(self) -> None:
        Method.__post_init__(self)
        check_count("reparameterization_hidden", self.reparameterization_hidden, do="use the default, 512")
        dropout: object = self.dropout
        if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise ConfigError(expected="dropout in [0, 1)", got=repr(dropout), do="use the default, 0.0")
        parts: object = self.parts
        if parts is not None and (not isinstance(parts, tuple) or not parts or set(parts) - set(_PARTS)):
            raise ConfigError(
                expected=f"parts to be some of {', '.join(_PARTS)}",
                got=repr(parts),
                do="write a tuple such as ('encoder', 'cross'), or leave it out for all parts",
            )

    @property
    def learning_rate(self) -> float:
        """Peak step size when a run names none; smaller through the network, which multiplies it."""
        return 1e-3 if self.reparameterization else 2e-1

    def build(self, frozen: FrozenModel, generator: Generator) -> PrefixModule:
        """A module whose start is exactly the activations of the words given, or noise at the scale of the model's."""
        frozen.spec.require_prefix()
        parts, layers = self._chosen(frozen.spec)
        length = prompt_length(self.init, self.num_virtual_tokens, frozen, usual=16)
        tokens = start_tokens(self.init, length, frozen, generator)

        def activations(tokens: Tokens) -> list[Float[Tensor, "P _C"]]:
            return _flatten(frozen.activations(tokens), [layer in layers for layer in frozen.spec.layers])

        reference = activations(reference_tokens(frozen, generator))
        start = [random_like(part, length, generator) for part in reference] if tokens is None else activations(tokens)
        scale = torch.cat([part.float().square().mean().sqrt().expand(part.shape[1]) for part in reference])
        joined = torch.cat(start, dim=1)
        with seeded(generator):
            offset = self._offset(length, joined.shape[1], width=frozen.spec.hidden_size)
        return PrefixModule(layers, joined, scale, offset, self.dropout, parts)

    def _offset(self, length: int, channels: int, width: int) -> Offset:
        if not self.reparameterization:
            return FreeOffset(length, channels)
        network = MLPOffset(length, channels, width=width, hidden=self.reparameterization_hidden, activation=nn.Tanh)
        return ResidualOffset(network, length, channels) if self.residual else network

    def _chosen(self, spec: ModelSpec) -> tuple[tuple[str, ...] | None, tuple[AttentionLayer, ...]]:
        """The parts asked for, in the model's order (None for all that it has), and their layers."""
        asked = self.parts or spec.parts
        unknown = [part for part in asked if part not in spec.parts]
        if unknown:
            raise ConfigError(
                expected=f"parts that the model has: {', '.join(spec.parts)}",
                got=", ".join(unknown),
                do="leave parts out: only an encoder-decoder has several",
            )
        parts = tuple(part for part in spec.parts if part in asked)
        return None if parts == spec.parts else parts, spec.layers_of(parts)


class PrefixModule(PromptModule):
    """Keys and values as `start + scale * offset`, one row of C channels per virtual token."""

    start: Tensor
    scale: Tensor

    def __init__(
        self,
        layers: Sequence[AttentionLayer],
        start: Float[Tensor, "P C"],
        scale: Float[Tensor, " C"],
        offset: Offset,
        dropout: float,
        parts: tuple[str, ...] | None,
    ) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.parts = parts
        self.offset = offset
        self.dropout = dropout
        self.register_buffer("start", start)
        self.register_buffer("scale", scale)

    def forward(self, generator: Generator | None = None) -> KVPrefix:
        """Keys and values of every layer, with dropout if a generator is given."""
        return _unflatten(self.flat(generator)[None], self.layers, self.parts)[0]

    def flat(self, generator: Generator | None) -> Float[Tensor, "P C"]:
        """All keys and values of a virtual token side by side."""
        flat: Tensor = self.start + self.scale * self.offset()
        if self.dropout and generator is not None:
            kept = torch.rand(flat.shape, generator=generator).to(flat.device) >= self.dropout
            flat = flat * kept / (1 - self.dropout)
        return flat

    @classmethod
    def of_all(cls, modules: Sequence[Any], generators: Sequence[Generator | None]) -> list[Prepared]:
        """What each module gives; prefixes of one shape are cut into layers together."""
        alike: dict[object, list[int]] = {}
        for number, module in enumerate(modules):
            alike.setdefault((module.layers, module.parts, module.start.shape), []).append(number)
        made: dict[int, Prepared] = {}
        for numbers in alike.values():
            flat = torch.stack([modules[number].flat(generators[number]) for number in numbers])
            first = modules[numbers[0]]
            made |= zip(numbers, _unflatten(flat, first.layers, first.parts), strict=True)
        return [made[number] for number in range(len(modules))]


def _flatten(prefix: KVPrefix, chosen: Sequence[bool]) -> list[Float[Tensor, "P _C"]]:
    """Keys and values of each chosen layer in turn as [P, heads * size]."""
    pairs = compress(zip(prefix.keys, prefix.values, strict=True), chosen)
    return [part.transpose(0, 1).flatten(1) for pair in pairs for part in pair]


def _unflatten(
    flat: Float[Tensor, "U P C"], layers: Sequence[AttentionLayer], parts: tuple[str, ...] | None
) -> list[KVPrefix]:
    shapes = [(layer.kv_heads, size) for layer in layers for size in (layer.key_dim, layer.value_dim)]
    columns = flat.split([heads * size for heads, size in shapes], dim=2)
    shaped = [c.unflatten(2, shape).transpose(1, 2).unbind(0) for c, shape in zip(columns, shapes, strict=True)]
    return [KVPrefix(tuple(own[0::2]), tuple(own[1::2]), parts) for own in zip(*shaped, strict=True)]
