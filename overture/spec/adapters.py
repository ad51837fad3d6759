"""What PEFT adapters make of a base model: which of them act, and what their numbers are called in its digest.

An adapter that acts is a part of the base model, one that does not is none. PEFT itself is not needed: its layers are
known by the names they give to what they hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import nn

__all__ = ["WRAPPED", "acting", "known_as", "layers"]

WRAPPED = ("base_layer", "original_module")
"""Names under which PEFT's layers hold what they stand for."""


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that hold adapters, by path, outer ones first."""
    for path, module in model.named_modules():
        # Asked of the class: that a module lacks an attribute takes it long to find out.
        if getattr(type(module), "adapter_layer_names", None):
            yield path, module


def acting(layer: Any) -> dict[str, Any]:
    """The adapters that take part in a layer, in order, each with its scale; merged ones are the layer's own weight."""
    if layer.disable_adapters:
        return {}
    here = {name for kind in layer.adapter_layer_names for name in _held(layer, kind)}
    scales = getattr(layer, "scaling", {})
    return {name: scales.get(name) for name in layer.active_adapters if name in here - set(layer.merged_adapters)}


def known_as(model: nn.Module) -> dict[str, str | None]:
    """Paths that PEFT made, and what they are called without it; None for what belongs to an adapter that is idle.

    An adapter's own name is left out, so that one adapter is one base model under any name.
    """
    names: dict[str, str | None] = {}
    for path, layer in layers(model):
        names |= {f"{path}.{inner}": path for inner in WRAPPED}
        active = list(acting(layer))
        for kind in cast(Any, layer).adapter_layer_names:
            for name in _held(layer, kind):
                number = f"{path}.{kind}.{active.index(name)}" if name in active else None
                names[f"{path}.{kind}.{name}"] = number
    return names


def _held(layer: nn.Module, kind: str) -> list[str]:
    """Names of the adapters that have something of a kind in a layer."""
    return list(getattr(layer, kind, None) or ())
