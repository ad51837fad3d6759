"""Models that stay as they are for a while: what was found out about them then need not be looked at again.

Whether a model is still the one that is known takes a look at every matrix, which in a training step is a share of the
time and makes a GPU wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

__all__ = ["once_settled", "settled"]

M = TypeVar("M", bound=nn.Module)
R = TypeVar("R")

_FOUND: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()


@contextmanager
def settled(model: nn.Module) -> Iterator[None]:
    """Promise that nobody changes the model's modules or weights inside. Contexts nest."""
    if model in _FOUND:
        yield
        return
    _FOUND[model] = {}
    try:
        yield
    finally:
        del _FOUND[model]


def once_settled(function: Callable[[M], R]) -> Callable[[M], R]:
    """A function of a model that is computed once while the model is settled, and every time otherwise."""

    @wraps(function)
    def found(model: M) -> R:
        known = _FOUND.get(model)
        if known is None:
            return function(model)
        if function.__qualname__ not in known:
            known[function.__qualname__] = function(model)
        result: R = known[function.__qualname__]
        return result

    return found
