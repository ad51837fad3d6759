"""Move a prefix to later positions: turn its keys as the model itself would have turned them there.

Rotary embeddings turn each plane of a key by an angle of its position. Models differ in which axes make a plane, which
axes turn at all, how fast, and whether all layers do alike. None of it is read from a config: one token alone, at
several positions, shows all of it, because nothing but the rotation changes its key.

Shape suffixes: N tokens, P positions, K key/value heads, D head size, R planes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from overture import dispatch
from overture.errors import ConfigError, ContextLengthError, UnsupportedModelError
from overture.prompt import KVPrefix
from overture.runtime.host import Host
from overture.runtime.recorder import KeyValueRecorder
from overture.spec import ModelSpec, execution_device, measuring

__all__ = ["concatenated", "shifted"]

_BLOCK = 64
"""Positions measured at a time."""
_TOKENS = 8
"""Tokens whose keys are compared at every position; each has several heads, and rounding averages out."""
_SPREAD = 64
"""Tokens, each at a position of its own, that show which axes make a plane."""
_FAR = 2**17
"""Positions among which those are that show the planes: slow ones need time to turn."""


def concatenated(prefixes: Sequence[KVPrefix]) -> KVPrefix:
    """Prefixes one after another as one, each already at its place.

    Raises:
        ConfigError: they are for different parts of the model.
    """
    if any(prefix.counted for prefix in prefixes):
        raise ConfigError(
            expected="prefixes that stand at no position in an encoder-decoder",
            got="one that counts as positions, as PEFT's do",
            do="use it alone",
        )
    parts = dict.fromkeys(prefix.parts for prefix in prefixes)
    if len(parts) > 1:
        raise ConfigError(
            expected="prompts for the same parts of the model",
            got=" and ".join("all parts" if names is None else "+".join(names) for names in parts),
            do="join prompts that were tuned for the same parts",
        )
    return replace(
        prefixes[0],
        keys=tuple(torch.cat(layer, dim=1) for layer in zip(*(prefix.keys for prefix in prefixes), strict=True)),
        values=tuple(torch.cat(layer, dim=1) for layer in zip(*(prefix.values for prefix in prefixes), strict=True)),
    )


def shifted(model: PreTrainedModel, host: Host, prefix: KVPrefix, offset: int) -> KVPrefix:
    """The prefix at positions offset..offset+P-1 instead of 0..P-1; differentiable with respect to it.

    Only keys that a rotary embedding turns change. Learned positions are part of what a prompt's tokens computed,
    values have no position, and in models that are told none (encoder-decoders) a prefix stands at none.

    Args:
        model: the model.
        host: the model's; asked for, because finding it looks at the whole model, and a batch has many prefixes.
        prefix: the prefix.
        offset: positions before it.

    Raises:
        ContextLengthError: it would end behind the model's context.
        UnsupportedModelError: what a position does to a key is no rotation.
    """
    end, limit = offset + prefix.length, _limit(host.spec)
    if end > limit:
        raise ContextLengthError(
            expected=f"prompts of together at most {limit} virtual tokens, the model's context",
            got=str(end),
            do="join fewer prompts, or use prompts with fewer virtual tokens",
        )
    if offset == 0 or host.spec.learned_positions or host.spec.first_position is None:
        return prefix
    rotation = _ROTATIONS.get(host)
    if rotation is None:
        with measuring(model):
            rotation = _ROTATIONS[host] = _Rotation(model, host)
    keys = (rotation.turned(layer, key, offset) for layer, key in enumerate(prefix.keys))
    return replace(prefix, keys=tuple(keys))


@dataclass(frozen=True, slots=True, eq=False)
class _Planes:
    """Which axes of one layer's keys turn together."""

    partner: Int[Tensor, " D"]
    """The other axis of each axis's plane; the axis itself if it does not turn."""

    @property
    def first(self) -> Int[Tensor, " R"]:
        """The lower axis of every plane."""
        return torch.nonzero(self.partner > torch.arange(len(self.partner)))[:, 0]

    def points(self, key: Float[Tensor, "... D"]) -> Complex[Tensor, "... R"]:
        """A key's place in every plane, as a complex number."""
        return torch.complex(key[..., self.first], key[..., self.partner[self.first]])

    def turned(self, key: Float[Tensor, "... D"], turn: Complex[Tensor, "... R"]) -> Float[Tensor, "... D"]:
        """A key with the point in every plane multiplied by `turn`."""
        first, second = self.first, self.partner[self.first]
        along = torch.ones(*turn.shape[:-1], len(self.partner), dtype=turn.real.dtype)
        across = torch.zeros_like(along)
        along[..., first] = along[..., second] = turn.real
        across[..., first], across[..., second] = -turn.imag, turn.imag
        return key * along.to(key) + key[..., self.partner.to(key.device)] * across.to(key)


class _Rotation:
    """What the positions of one model do to the keys of each of its layers, measured when first needed.

    Angles are measured position by position and not multiplied up from one: models compute them in fp32, and the
    rounding of an angle grows with its position.
    """

    def __init__(self, model: PreTrainedModel, host: Host) -> None:
        self.model, self.host = model, host
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(host.spec.vocab_size, (_SPREAD,), generator=generator)
        spread = torch.linspace(1, min(_limit(host.spec), _FAR) - 1, _SPREAD).long()
        still, still_values = self._activations(self.ids, torch.zeros_like(spread))
        moved, moved_values = self._activations(self.ids, spread)
        tolerance = _tolerance(model)
        self.absolute = any(
            not torch.allclose(a, b, rtol=0, atol=tolerance * float(a.abs().max()))
            for a, b in zip(still_values, moved_values, strict=True)
        )
        self.planes = [_planes(a, b) for a, b in zip(still, moved, strict=True)]
        self.turns: list[list[Complex[Tensor, "P R"]]] = []

    def turned(self, layer: int, key: Float[Tensor, "K P D"], offset: int) -> Float[Tensor, "K P D"]:
        """A layer's keys of positions 0..P-1, at positions offset..offset+P-1."""
        if self.absolute:
            # A value that depends on the position: positions are a part of what tokens compute, as learned ones are.
            return key
        length = key.shape[1]
        while len(self.turns) * _BLOCK < offset + length:
            with measuring(self.model):
                self.turns.append(self._measured(len(self.turns) * _BLOCK))
        turns = torch.cat([block[layer] for block in self.turns])
        return self.planes[layer].turned(key, turns[offset : offset + length] / turns[:length])

    def _measured(self, start: int) -> list[Complex[Tensor, "P R"]]:
        """Per layer, what turns a key from position 0 to each position of the block that begins at `start`."""
        positions = torch.arange(start, min(start + _BLOCK, _limit(self.host.spec)))
        ids = self.ids[:_TOKENS]
        still, _ = self._activations(ids, torch.zeros_like(ids))
        moved, _ = self._activations(ids.repeat(len(positions)), positions.repeat_interleave(_TOKENS))
        turns = []
        for number, (planes, before, flat) in enumerate(zip(self.planes, still, moved, strict=True)):
            after = flat.unflatten(0, (len(positions), _TOKENS))
            points = planes.points(before)
            # The complex number nearest to turning every token's point, by least squares.
            squares = points.abs().square().sum((0, 1))
            turn = torch.where(squares > 0, (points.conj() * planes.points(after)).sum((1, 2)) / squares, 1)
            left = (after - planes.turned(before, turn[:, None, None])).norm() / after.norm()
            if not left <= _tolerance(self.model):
                raise UnsupportedModelError(
                    expected="a model whose positions turn the planes of its keys (a rotary embedding), or leave "
                    "keys alone",
                    got=f"{self.host.spec.base.architecture}, whose layer {number} does something else "
                    f"(a share of {left:.1e} of the keys is not explained)",
                    do="tune one prompt for all purposes, or use a model such as Llama, Qwen, Gemma, Mistral or GPT-2",
                )
            turns.append(turn)
        return turns

    def _activations(
        self, ids: Int[Tensor, " N"], positions: Int[Tensor, " N"]
    ) -> tuple[list[Float[Tensor, "N K D"]], list[Float[Tensor, "N K E"]]]:
        """Keys and values of every layer for tokens that stand alone, each at its position; fp64."""
        recorder, device = KeyValueRecorder(), execution_device(self.model)
        with self.host.using(None):
            self.host.stacks[0](
                input_ids=ids[:, None].to(device),
                position_ids=(positions + (self.host.spec.first_position or 0))[:, None].to(device),
                use_cache=False,
                **{dispatch.KEYWORD: recorder},
            )
        keys, values = ([t[:, :, 0].cpu().double() for t in kept] for kept in (recorder.keys, recorder.values))
        return keys, values


_ROTATIONS: WeakKeyDictionary[Host, _Rotation] = WeakKeyDictionary()


def _planes(still: Float[Tensor, "N K D"], moved: Float[Tensor, "N K D"]) -> _Planes:
    """Find the planes: whatever the angle, what one axis of a plane gains in square length the other loses."""
    gains = (moved.square() - still.square()).flatten(0, 1)
    lengths = gains.square().sum(0)
    partner = (lengths[:, None] + lengths + 2 * gains.T @ gains).fill_diagonal_(torch.inf).argmin(1)
    axes = torch.arange(len(partner))
    return _Planes(torch.where((partner[partner] == axes) & (lengths > 0), partner, axes))


def _limit(spec: ModelSpec) -> int:
    """Positions that there are. One beyond the reach of a rotary embedding would change the angles of all others."""
    return min((limit for limit in (spec.max_positions, spec.rotary_limit) if limit is not None), default=sys.maxsize)


def _tolerance(model: PreTrainedModel) -> float:
    """Share of a key that rounding may take: of the model's dtype, or of the fp32 in which angles are computed."""
    return max(8 * float(torch.finfo(model.dtype).eps), 1e-4)
