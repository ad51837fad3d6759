"""One forward pass of a stack: what it reads, and at which positions.

Shape suffixes: B rows, T text.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor, nn

from overture.errors import ContextLengthError, UnsupportedModelError
from overture.runtime.embedding import TokenRows
from overture.spec import ModelSpec

__all__ = ["Pass", "check_room", "first_axis"]


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """The keywords of a forward pass."""

    kwargs: dict[str, Any]
    parameters: Mapping[str, inspect.Parameter]
    """Of the forward method."""
    start: int
    """Positions before this pass, which a cache holds."""

    @classmethod
    def of(cls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tokens: TokenRows | None) -> Pass:
        """The pass that a module is called for, every argument by its name."""
        parameters = _parameters(getattr(module, "_orig_mod", module).forward)
        kwargs = dict(zip(parameters, args, strict=False)) | kwargs
        return cls(kwargs, parameters, _start(kwargs, tokens))

    @property
    def text(self) -> Tensor:
        """What tells rows apart: a decoder's rows begin alike, and differ in what they look at."""
        names = ("encoder_hidden_states", "input_ids", "inputs_embeds")
        found: Tensor = next(self.kwargs[name] for name in names if self.kwargs.get(name) is not None)
        return found

    @property
    def length(self) -> int:
        """Positions of this pass, T."""
        ids: Tensor | None = self.kwargs.get("input_ids")
        return int((self.kwargs["inputs_embeds"] if ids is None else ids).shape[1])

    def positions(self, spec: ModelSpec, offsets: Int[Tensor, " B"] | None = None) -> Int[Tensor, "... T"]:
        """Position ids of the text, counted without padding: each row starts at its offset."""
        positions: Tensor | None = self.kwargs.get("position_ids")
        if positions is None:
            mask = self.kwargs.get("attention_mask")
            if isinstance(mask, Tensor) and mask.ndim == 2:
                positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -self.length :]
            else:
                positions = torch.arange(self.start, self.start + self.length, device=self.text.device)[None]
            positions = positions + (spec.first_position or 0)
        elif spec.first_position and self.start == 0:
            self._check_first(positions, spec.first_position)
        return positions if offsets is None else positions + offsets.to(positions.device)[:, None]

    def _check_first(self, positions: Int[Tensor, "... T"], first: int) -> None:
        mask = self.kwargs.get("attention_mask")
        seen = mask.bool() if isinstance(mask, Tensor) and mask.shape == positions.shape else positions == positions
        least = int(positions[seen].min())
        if least < first:
            raise UnsupportedModelError(
                expected=f"position ids from {first}, where this model's text begins",
                got=f"{least}, such as transformers' generate passes to a decoder of this kind",
                do="leave position_ids out, and generate with a model such as Llama or GPT-2",
            )


def _parameters(forward: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The parameters of a forward method. Finding them takes as long as a small layer, so those of a class are kept."""
    if not inspect.ismethod(forward):
        return inspect.signature(forward).parameters
    found = _OF_METHODS.get(forward.__func__)
    if found is None:
        found = _OF_METHODS[forward.__func__] = inspect.signature(forward).parameters
    return found


# Weakly: a function that was put in the place of a model's own may hold the model.
_OF_METHODS: WeakKeyDictionary[Callable[..., Any], Mapping[str, inspect.Parameter]] = WeakKeyDictionary()


def check_room(spec: ModelSpec, positions: Int[Tensor, "... T"], *, ahead: bool) -> None:
    """Raise `ContextLengthError` if text stands where the model has no positions for it.

    Args:
        spec: the model's shape.
        positions: of the text.
        ahead: whether anything was run ahead of it.
    """
    if spec.learned_positions:
        limit, what = spec.max_positions, "positions"
    else:
        # Keys computed ahead of the text are those of a short one.
        limit, what = spec.rotary_limit if ahead else None, "positions, at which its rotary embedding changes"
    if limit is None:  # reading a number would wait for the device
        return
    count = int(positions.max()) - (spec.first_position or 0) + 1
    if count > limit:
        raise ContextLengthError(
            expected=f"virtual tokens and text within the model's {limit} {what}",
            got=f"{count} positions",
            do="shorten the text or use a prompt with fewer virtual tokens",
        )


def first_axis(positions: Int[Tensor, "... T"] | None) -> Int[Tensor, "_B T"] | None:
    """Positions in time, where they have further axes for places in a picture."""
    return positions if positions is None or positions.ndim < 3 else positions[0]


def _start(kwargs: Mapping[str, Any], tokens: TokenRows | None) -> int:
    past, state = kwargs.get("past_key_values"), kwargs.get("cache_params")
    if past is not None:
        return int(past.get_seq_length())
    if state is not None and tokens is not None and state.has_previous_state():
        # A recurrent state (Mamba) does not count. The input that filled it had every place of a virtual token.
        return tokens.slots.shape[1]
    return 0
