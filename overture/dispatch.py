"""Route every attention call of a model through one function, which a keyword of the forward pass may replace.

transformers hands unknown keywords of `forward` down to the attention function, through gradient checkpointing too. So
the replacement travels as a keyword and not in a context variable: recomputation runs in the backward pass, after any
context has ended. Without the keyword the model's own attention function runs, bit for bit.

The route stands under the implementations' own names. A model's config stays as it is: modeling code compares the name
to choose its masks, and another name would change the model itself.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from overture.errors import UnsupportedModelError

__all__ = [
    "KEYWORD",
    "AttentionFunction",
    "AttentionHandler",
    "AttentionWitness",
    "install",
    "quick_to_start",
    "require_masks",
]

KEYWORD = "overture_attention"
_ROUTED = ("sdpa", "eager", "flex_attention")


@runtime_checkable
class AttentionFunction(Protocol):
    """The signature of transformers' attention functions. `query` is [B, H, T, D], `key` and `value` [B, K, S, D]."""

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Output [B, T, H, D], and the attention weights if there are any."""
        ...


@runtime_checkable
class AttentionHandler(Protocol):
    """What may be passed under `KEYWORD`: it sees every attention call, with the model's own function to call on."""

    def attend(
        self,
        inner: AttentionFunction,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Answer one attention call, usually by calling `inner` with more keys and values."""
        ...


class AttentionWitness(ABC):
    """A handler that answers as the model does, and sees every call."""

    def attend(
        self,
        inner: AttentionFunction,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Note the call, and answer as the model does."""
        self.note(module, query, key, value, kwargs)
        return inner(module, query, key, value, attention_mask, **kwargs)

    @abstractmethod
    def note(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]) -> None:
        """See one call, with its further keywords."""


def install() -> None:
    """Route transformers' `sdpa`, `eager` and `flex_attention` through Overture, once per process."""
    for name in _ROUTED:
        original = ALL_ATTENTION_FUNCTIONS.get(name)
        if not isinstance(original, _Route):
            AttentionInterface.register(name, _Route(original))


def require_masks(model: nn.Module) -> None:
    """Raise `UnsupportedModelError` unless the model's attention implementation takes an explicit mask."""
    name = getattr(model.config, "_attn_implementation", None)
    if name not in _ROUTED:
        raise UnsupportedModelError(
            expected="attention that takes an explicit mask: sdpa, eager or flex_attention",
            got=f"attn_implementation={name!r}",
            do="call model.set_attn_implementation('sdpa') before using a prefix",
        )


@contextmanager
def quick_to_start(model: PreTrainedModel) -> Iterator[None]:
    """`sdpa` in place of `flex_attention`, which is compiled for a minute before it answers a first small input."""
    name = model.config._attn_implementation
    if name == "flex_attention":
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if name == "flex_attention":
            model.set_attn_implementation(name)


class _Route:
    """An attention function that hands over to the handler of the forward pass, if there is one."""

    def __init__(self, original: AttentionFunction | None) -> None:
        """`original` is None for `eager`, of which every modeling file has its own."""
        self.original = original

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        handler: AttentionHandler | None = kwargs.pop(KEYWORD, None)
        inner = self.original or _eager(module)
        if handler is None:
            return inner(module, query, key, value, attention_mask, **kwargs)
        return handler.attend(inner, module, query, key, value, attention_mask, **kwargs)


def _eager(module: nn.Module) -> AttentionFunction:
    # A user's subclass may live in another module than its base.
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function  # type: ignore[no-any-return]
    raise UnsupportedModelError(
        expected="an eager_attention_forward beside the model's attention class",
        got=type(module).__qualname__,
        do="load the model with attn_implementation='sdpa'",
    )
