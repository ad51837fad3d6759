"""Route every attention call of a model through one function, which a keyword of the forward pass may replace.

transformers hands unknown keywords of `forward` down to the attention function, through gradient checkpointing too. So
the replacement travels as a keyword and not in a context variable: recomputation runs in the backward pass, after any
context has ended. Without the keyword the model's own attention function runs, bit for bit.
"""

from __future__ import annotations

import sys
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from overture.errors import UnsupportedModelError

__all__ = [
    "KEYWORD",
    "AttentionFunction",
    "AttentionHandler",
    "attach",
    "detach",
    "implementation",
    "require_masks",
]

KEYWORD = "overture_attention"
_PREFIX = "overture_"


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


def implementation(model: nn.Module) -> str:
    """The attention implementation the model itself asked for, such as `sdpa` or `eager`."""
    return str(getattr(model.config, "_attn_implementation", "") or "").removeprefix(_PREFIX)


def require_masks(model: nn.Module) -> None:
    """Raise `UnsupportedModelError` unless the model's attention implementation takes an explicit mask."""
    name = implementation(model)
    if name not in ("sdpa", "eager"):
        raise UnsupportedModelError(
            expected="attention that takes an explicit mask: sdpa or eager",
            got=f"attn_implementation={name!r}",
            do="call model.set_attn_implementation('sdpa') before using a prefix",
        )


def attach(model: PreTrainedModel) -> None:
    """Route the model's attention through Overture. Idempotent; outputs stay the same bits without a handler."""
    for config in _configs(model):
        name = config._attn_implementation
        if name is None or name.startswith(_PREFIX):
            continue
        routed = _PREFIX + name
        if routed not in ALL_ATTENTION_FUNCTIONS:
            AttentionInterface.register(routed, _Route(name))
            if name in ALL_MASK_ATTENTION_FUNCTIONS:
                # Without a mask function of the same name a model would build no mask at all.
                AttentionMaskInterface.register(routed, ALL_MASK_ATTENTION_FUNCTIONS[name])
        config._attn_implementation_internal = routed


def detach(model: PreTrainedModel) -> None:
    """Undo `attach`."""
    for config in _configs(model):
        name = config._attn_implementation
        if name is not None:
            config._attn_implementation_internal = name.removeprefix(_PREFIX)


def _configs(model: PreTrainedModel) -> list[Any]:
    models = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    return list({id(m.config): m.config for m in models}.values())


class _Route:
    """The attention function registered as `overture_<name>`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.__name__ = _PREFIX + name

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        handler: AttentionHandler | None = kwargs.pop(KEYWORD, None)
        inner = _inner(self.name, module)
        if handler is None:
            return inner(module, query, key, value, attention_mask, **kwargs)
        return handler.attend(inner, module, query, key, value, attention_mask, **kwargs)


def _inner(name: str, module: nn.Module) -> AttentionFunction:
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]  # type: ignore[no-any-return]
    # Each modeling file defines its own eager function; a user's subclass may live in another module than its base.
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function  # type: ignore[no-any-return]
    raise UnsupportedModelError(
        expected="an eager_attention_forward beside the model's attention class",
        got=type(module).__qualname__,
        do="load the model with attn_implementation='sdpa'",
    )
