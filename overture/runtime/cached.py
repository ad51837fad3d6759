"""A prefix in front of transformers' cache: one buffer per layer holds both, with room to grow.

`DynamicCache` joins what it holds and what is new at every step. To join the prefix as well would copy everything once
more; here a step writes its own keys and values, and copies nothing.

Shape suffixes: B rows, K key/value heads, S text, N new text, D key size, E value size.
"""

from __future__ import annotations

from typing import Any
from weakref import ref

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from overture.errors import ConfigError
from overture.runtime.rows import PrefixRows

__all__ = ["PrefixedLayer", "arm", "disarm", "growing", "keeps"]

# Virtual tokens of the longest prefix that a cache keeps: every row holds a copy, also of one that they share.
_LONGEST = 256
_LEAST_ROOM = 64

Pair = tuple[Tensor, Tensor]
"""Keys and values."""


class PrefixedLayer(DynamicLayer):
    """A cache layer with room for prefixes in front of its text.

    To transformers and to the model it holds the text alone; `joined` has both. Its tensors, read between two passes,
    its copies, and what `pickle` writes are without the prefixes, which are somebody's. Where other tensors are put in
    the place of its keys and values (by beams, or `crop`), the next step builds new buffers.

    Args:
        number: the attention layer, among all of the model.
        rows: the prefixes of the pass under way.
    """

    buffers: Pair | None = None
    """Prefixes, text, and room for more; None if `plain` holds the text."""
    plain: tuple[Tensor | None, Tensor | None] = (None, None)

    def __init__(self, number: int, rows: PrefixRows) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number = number
        self.rows: PrefixRows | None = rows
        """The prefixes of the pass under way; None while the layer is not armed."""
        self.built: ref[PrefixRows] | None = None
        """The prefixes in the buffers. They must not live for as long as a cache does."""
        self.ahead = self.taken = 0
        """Positions of the prefixes, and of these and the text, from the beginning of the buffers."""
        self.given: Pair | None = None
        """The text's keys and values as the last armed step handed them out."""

    @property
    def keys(self) -> Tensor | None:
        """Of the text."""
        return self._text(0)

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._release(keys, self.values)

    @property
    def values(self) -> Tensor | None:
        """Of the text."""
        return self._text(1)

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._release(self.keys, values)

    def get_seq_length(self) -> int:
        """Positions of the text."""
        return self.taken - self.ahead if self.buffers is not None else super().get_seq_length()

    def update(
        self, key_states: Float[Tensor, "B K N D"], value_states: Float[Tensor, "B K N E"], *args: Any, **kwargs: Any
    ) -> Pair:
        """Take in new keys and values; gives the text's."""
        if self.rows is None or torch.compiler.is_compiling():
            text: Pair = super().update(key_states, value_states, *args, **kwargs)
            return text
        new, held = key_states.shape[2], self.plain[0] if self.buffers is None else self.buffers[0]
        if held is not None and held.shape[0] != key_states.shape[0] and self.get_seq_length():
            raise ConfigError(
                expected=f"the {held.shape[0]} rows that the cache holds",
                got=f"a pass of {key_states.shape[0]}",
                do="begin a cache of its own for other rows",
            )
        buffers = self.buffers if self._has_room(key_states, value_states) else self._build(key_states, value_states)
        assert buffers is not None
        # Every token comes here in every layer: `narrow` takes half as long as slices do.
        key, value = buffers
        key.narrow(2, self.taken, new).copy_(key_states)
        value.narrow(2, self.taken, new).copy_(value_states)
        self.taken += new
        self.given = self._of_text(key), self._of_text(value)
        return self.given

    def joined(self) -> Pair:
        """Prefixes and text."""
        assert self.buffers is not None
        key, value = self.buffers
        return key.narrow(2, 0, self.taken), value.narrow(2, 0, self.taken)

    def take_over(self, layer: DynamicLayer) -> Pair:
        """Hold what a plain layer holds; it and the prefixes."""
        assert layer.keys is not None
        assert layer.values is not None
        self.plain, self.is_initialized = (layer.keys, layer.values), True
        self._build(layer.keys[:, :, :0], layer.values[:, :, :0])
        return self.joined()

    def __reduce_ex__(self, protocol: Any) -> tuple[type[DynamicLayer], tuple[()], dict[str, Any]]:
        """For `copy` and `pickle`: a layer of transformers' own that holds this text."""
        held = self.plain if self.buffers is None else tuple(map(self._of_text, self.buffers))
        keys, values = (None if tensor is None else tensor.clone() for tensor in held)
        state = {"keys": keys, "values": values, "is_initialized": self.is_initialized}
        return DynamicLayer, (), state if keys is None else state | {"dtype": keys.dtype, "device": keys.device}

    def _has_room(self, key: Tensor, value: Tensor) -> bool:
        if self.buffers is None or self.built is None or self.built() is not self.rows:
            return False
        keys, values = self.buffers
        # As joining them would: what is wider than the buffers widens them (autocast that ended).
        if torch.promote_types(keys.dtype, key.dtype) != keys.dtype:
            return False
        if torch.promote_types(values.dtype, value.dtype) != values.dtype:
            return False
        if self.taken + key.shape[2] > keys.shape[2]:
            return False
        return torch.is_inference_mode_enabled() or not keys.is_inference()

    def _build(self, new_keys: Tensor, new_values: Tensor) -> Pair:
        """Buffers with the prefixes and the text so far, and room for what is new and more."""
        rows, old = self.rows, self.get_seq_length()
        assert rows is not None
        ahead = rows.longest(self.number)
        length = ahead + old + new_keys.shape[2] + max(_LEAST_ROOM, old // 8)

        def joined(prefixes: Tensor, text: Tensor | None, new: Tensor) -> Tensor:
            dtype = new.dtype if text is None else torch.promote_types(text.dtype, new.dtype)
            buffer = new.new_empty(*new.shape[:2], length, new.shape[3], dtype=dtype)
            buffer[:, :, :ahead] = rows.chosen(prefixes, like=buffer)
            if text is not None and old:
                buffer[:, :, ahead : ahead + old] = text
            return buffer

        made = (
            joined(rows.keys[self.number], self.keys, new_keys),
            joined(rows.values[self.number], self.values, new_values),
        )
        self.buffers, self.built, self.plain, self.ahead, self.taken = made, ref(rows), (None, None), ahead, ahead + old
        self.is_initialized, self.dtype, self.device = True, made[0].dtype, made[0].device
        return made

    def _text(self, which: int) -> Tensor | None:
        if self.buffers is not None and self.rows is None:
            # Whoever reads between two passes may keep it, and a view would keep the prefixes.
            self._release(*(self._of_text(buffer).clone() for buffer in self.buffers))
        return self.plain[which] if self.buffers is None else self._of_text(self.buffers[which])

    def _of_text(self, buffer: Tensor) -> Tensor:
        return buffer.narrow(2, self.ahead, self.taken - self.ahead)

    def _release(self, keys: Tensor | None, values: Tensor | None) -> None:
        self.plain, self.buffers, self.built, self.given = (keys, values), None, None, None


def growing(cache: object) -> DynamicCache | None:
    """The cache, if its layers may be exchanged for prefixed ones: transformers' own, not offloaded, no gradient."""
    if type(cache) is not DynamicCache or cache.offloading or torch.is_grad_enabled():
        return None
    return cache


def keeps(rows: PrefixRows, number: int) -> bool:
    """Whether a cache takes in the prefixes of an attention layer: there are some, and they are not too long."""
    return 0 < rows.longest(number) <= _LONGEST


def arm(cache: DynamicCache, rows: PrefixRows) -> None:
    """Let prefixed layers keep these prefixes, until `disarm`."""
    for layer in cache.layers:
        if isinstance(layer, PrefixedLayer) and keeps(rows, layer.number):
            layer.rows = rows


def disarm(cache: DynamicCache) -> None:
    """Let all layers be plain ones again."""
    for layer in cache.layers:
        if isinstance(layer, PrefixedLayer):
            layer.rows = None
