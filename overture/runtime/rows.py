"""Ragged prompts of one batch: which row carries which prefix, of which length.

Shape suffixes: B rows, U distinct prompts, P longest prefix, K key/value heads, D head size, T text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from overture.prompt import KVPrefix
from overture.spec import AttentionLayer

__all__ = ["PrefixRows", "repeats"]


@dataclass(frozen=True, slots=True, eq=False)
class PrefixRows:
    """Distinct prefixes stacked once, and each row's choice among them.

    The prefixes of one batch may be for different parts of an encoder-decoder: one that leaves a part out has length 0
    there.
    """

    keys: tuple[Float[Tensor, "U _K _P _D"], ...]
    """Per attention layer; shorter prefixes are filled up with zeros that no row sees."""
    values: tuple[Float[Tensor, "U _K _P _E"], ...]
    """Per attention layer."""
    parts: tuple[str, ...]
    """Per attention layer, the part of the model that it belongs to."""
    choice: Int[Tensor, " B"]
    """Index of each row's prefix; that of an empty one for a row without."""
    lengths: Mapping[str, Int[Tensor, " B"]]
    """Per part, the length of each row's prefix; 0 for a row without one."""
    uniform: Mapping[str, bool]
    """Per part, True if every row has a prefix of the same length, so that nothing needs masking."""

    @classmethod
    def stack(
        cls, rows: Sequence[KVPrefix | None], layers: Sequence[AttentionLayer], device: torch.device
    ) -> PrefixRows | None:
        """Stack the prefixes of a batch, each distinct object once; None if no row has one."""
        distinct = list({id(row): row for row in rows if row is not None}.values())
        if not distinct:
            return None
        place = {id(prefix): i for i, prefix in enumerate(distinct)}
        # A prefix of its own: whatever stands in another row's prefix, NaN too, must not reach a row without one.
        nothing = len(distinct)
        covered: list[KVPrefix | None] = [*distinct, None] if any(row is None for row in rows) else [*distinct]
        tensors = [_spread(prefix, layers, like=distinct[0].keys[0]) for prefix in covered]
        parts = tuple(layer.part for layer in layers)
        lengths = {part: [_length(row, part) for row in rows] for part in dict.fromkeys(parts)}
        return cls(
            keys=tuple(map(_stack, zip(*(keys for keys, _ in tensors), strict=True))),
            values=tuple(map(_stack, zip(*(values for _, values in tensors), strict=True))),
            parts=parts,
            choice=torch.tensor([nothing if row is None else place[id(row)] for row in rows], device=device),
            lengths={part: torch.tensor(found, device=device) for part, found in lengths.items()},
            uniform={part: len(set(found)) == 1 for part, found in lengths.items()},
        )

    def longest(self, layer: int) -> int:
        """P, the longest prefix in a layer; 0 if the layer's part has none."""
        return self.keys[layer].shape[2]

    def repeated(self, times: int) -> PrefixRows:
        """Each row `times` times in a row, as beams and `num_return_sequences` repeat them."""
        if times == 1:
            return self
        lengths = {part: found.repeat_interleave(times) for part, found in self.lengths.items()}
        return replace(self, choice=self.choice.repeat_interleave(times), lengths=lengths)

    def visible(self, layer: int) -> Bool[Tensor, "B P"]:
        """True where a row's prefix has a position in a layer."""
        lengths = self.lengths[self.parts[layer]]
        return torch.arange(self.longest(layer), device=lengths.device) < lengths[:, None]


def _length(prefix: KVPrefix | None, part: str) -> int:
    left_out = prefix is None or (prefix.parts is not None and part not in prefix.parts)
    return 0 if prefix is None or left_out else prefix.length


def _spread(
    prefix: KVPrefix | None, layers: Sequence[AttentionLayer], like: Tensor
) -> tuple[list[Float[Tensor, "_K _P _D"]], list[Float[Tensor, "_K _P _E"]]]:
    """Keys and values for every layer; those of no positions for a layer that the prefix leaves out."""
    keys = [like.new_zeros(layer.kv_heads, 0, layer.key_dim) for layer in layers]
    values = [like.new_zeros(layer.kv_heads, 0, layer.value_dim) for layer in layers]
    if prefix is not None:
        covered = [i for i, layer in enumerate(layers) if prefix.parts is None or layer.part in prefix.parts]
        for i, key, value in zip(covered, prefix.keys, prefix.values, strict=True):
            keys[i], values[i] = key, value
    return keys, values


def _stack(layer: Sequence[Float[Tensor, "K _P D"]]) -> Float[Tensor, "U K P D"]:
    longest = max(tensor.shape[1] for tensor in layer)
    filled = [pad(t, (0, 0, 0, longest - t.shape[1])) if t.shape[1] < longest else t for t in layer]
    return torch.stack(filled)


def repeats(batch: int, rows: int) -> int | None:
    """How often each of `rows` rows stands in a batch of `batch`, or None if it cannot be."""
    return batch // rows if rows and batch % rows == 0 else None
