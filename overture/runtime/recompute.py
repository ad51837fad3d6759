"""Gradient checkpointing that also acts in evaluation mode, and that lets a prompt's gradient through."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from overture.dispatch import KEYWORD
from overture.runtime.attention import PrefixAttention
from overture.spec import ModelSpec, block_modules

__all__ = ["Checkpoint", "checkpointed_blocks", "checkpointing", "prefixes_as_arguments"]

Checkpoint = Callable[..., Any]
"""Called with a function and its positional arguments; computes it now and again in the backward pass."""


def checkpointing(**options: Any) -> Checkpoint:
    """Torch's checkpointing with these options, of the kind that needs no gradient at its inputs unless asked."""
    return partial(checkpoint, **{"use_reentrant": False} | options)


@contextmanager
def checkpointed_blocks(
    model: PreTrainedModel, function: Checkpoint | None, *, every_n_layers: int = 1
) -> Iterator[None]:
    """Recompute every n-th transformer block in the backward pass; `function` None recomputes none.

    transformers' own switch acts only in training mode, where the base model's dropout would be on.
    """
    if function is None:
        yield
        return
    blocks = list(dict.fromkeys(block_modules(model, ModelSpec.of(model).layers)))[::every_n_layers]
    patched = {block: block.__dict__.get("forward") for block in blocks}
    for block in blocks:
        block.forward = partial(_recomputed, function, block.forward)
    try:
        yield
    finally:
        for block, before in patched.items():
            if before is None:
                del block.forward
            else:
                block.forward = before


@contextmanager
def prefixes_as_arguments(model: PreTrainedModel) -> Iterator[None]:
    """Let transformers' own reentrant checkpointing, where it is on, hand on the gradient of prefixes."""
    modules: Iterable[Any] = model.modules() if model.training else ()
    functions = {
        module: module._gradient_checkpointing_func
        for module in modules
        if getattr(module, "gradient_checkpointing", False) and _reentrant(module._gradient_checkpointing_func)
    }
    for module, function in functions.items():
        module._gradient_checkpointing_func = partial(_called, function)
    try:
        yield
    finally:
        for module, function in functions.items():
            module._gradient_checkpointing_func = function


def _reentrant(function: object) -> bool:
    return isinstance(function, partial) and bool(function.keywords.get("use_reentrant"))


def _called(function: Checkpoint, call: Callable[..., Any], *args: Any) -> Any:
    """What transformers calls: a block bound to its keywords, and its positional arguments."""
    if not isinstance(call, partial):
        return function(call, *args)
    return _recomputed(function, partial(call.func, *call.args), *args, **call.keywords)


def _recomputed(function: Checkpoint, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a block through `function`, with the prefixes of the pass among its positional arguments.

    The reentrant kind runs a backward pass of its own in every block and hands on gradient to positional tensors only.
    Prefixes that it met inside would be taken back through the prompt's network once per block.
    """
    handler = kwargs.get(KEYWORD)
    if not isinstance(handler, PrefixAttention):
        return function(partial(forward, **kwargs), *args)
    rows, before = handler.rows, handler.order.copy()
    layers, count = len(rows.keys), len(args)

    def run(*given: Any) -> Any:
        prefixes = given[count:]
        again = copy.copy(handler)
        again.rows = replace(rows, keys=prefixes[:layers], values=prefixes[layers:])
        # A module of several layers must be, when the block is repeated, the layer it was at first.
        again.order = before.copy()
        out = forward(*given[:count], **kwargs | {KEYWORD: again})
        handler.order = again.order
        return out

    return function(run, *args, *rows.keys, *rows.values)
