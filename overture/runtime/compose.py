"""New prompts from old ones: `join` puts prompts one behind another, `average` takes their mean."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from overture.errors import BaseMismatchError, ConfigError, OvertureError
from overture.prompt import Head, KVPrefix, SoftPrompt, Value, VirtualTokens
from overture.runtime.fill import common_template
from overture.runtime.host import Host
from overture.runtime.prompts import Piece, as_prefixes, check, head_of
from overture.spec import unwrapped
from overture.template import Template

__all__ = ["average", "join", "joined_rows"]

AnyPrompt = TypeVar("AnyPrompt", bound=SoftPrompt | Value)


def join(model: nn.Module, *prompts: Piece) -> SoftPrompt | KVPrefix:
    """One prompt out of several that lead the same text: a task's and a user's, say.

    Every prompt computes what it computes alone, at a later place: the first keeps positions 0..P-1, and the keys of
    the others are turned by the model's own rotation. No prompt attends to another; the text attends to all of them.
    Where positions are learned (GPT-2, OPT), keys stay as they are: the position is part of what a prompt computed.

    Args:
        model: the base model of all of them.
        prompts: one or more, in order. Bare values may carry gradient, and the result then does.

    Returns:
        A SoftPrompt (fp32, on the CPU, `method` names the parts) if all are SoftPrompts, else a KVPrefix on the model's
        device.

    Raises:
        ConfigError: none, prompts inside the text or for different parts of the model, templates that read the text
            differently, or several heads.
        BaseMismatchError: a prompt was tuned on another base model, or has another shape.
        ContextLengthError: together they are longer than the model's context.
        UnsupportedModelError: the model takes no prefix, or what a position does to its keys is no rotation.
    """
    model = unwrapped(model)
    host = Host.of(model)
    if not prompts:
        raise ConfigError(expected="prompts to join", got="none", do="pass join(model, first, second)")
    check(host, prompts)
    saved = [prompt for prompt in prompts if isinstance(prompt, SoftPrompt)]
    template = common_template(prompt.template for prompt in saved)
    joined = cast(KVPrefix, as_prefixes(model, host, [prompts])[0])
    if len(saved) < len(prompts):
        return joined
    stored = joined.map(lambda t: t.detach().float().cpu().contiguous())
    if template is not None:
        template = Template.parse(f"[V{stored.length}]{template.reading}")
    return SoftPrompt(stored, host.spec.base, template, _method("join", saved), {}, _name(saved), head_of(prompts))


def joined_rows(
    model: nn.Module, rows: Sequence[SoftPrompt | tuple[SoftPrompt | None, ...] | None]
) -> list[SoftPrompt | None]:
    """Rows with every tuple of prompts joined, equal tuples once."""
    ready: dict[tuple[int, ...], SoftPrompt] = {}
    joined: list[SoftPrompt | None] = []
    for row in rows:
        if isinstance(row, tuple):
            pieces = [piece for piece in row if piece is not None]
            key = tuple(map(id, pieces))
            if pieces and key not in ready:
                ready[key] = cast(SoftPrompt, join(model, *pieces))
            row = ready.get(key)
        joined.append(row)
    return joined


def average(prompts: Sequence[AnyPrompt], weights: Sequence[float] | None = None) -> AnyPrompt:
    """The weighted mean of prompts of one kind, shape and base model.

    Args:
        prompts: all SoftPrompts, all VirtualTokens or all KVPrefixes.
        weights: one per prompt, 0 or more, in any unit: their sum counts as the whole. None weighs all alike.

    Returns:
        The mean, of the kind of the prompts, differentiable with respect to them.

    Raises:
        ConfigError: no prompts, not one weight per prompt, weights without a mean, prompts of several kinds, or
            templates or heads that differ.
        BaseMismatchError: prompts of several base models or shapes.
    """
    if not prompts:
        raise ConfigError(expected="prompts to average", got="none", do="pass a list of prompts")
    shares = _shares(len(prompts), weights)
    saved = [prompt for prompt in prompts if isinstance(prompt, SoftPrompt)]
    values = [prompt.value if isinstance(prompt, SoftPrompt) else prompt for prompt in prompts]
    _check_alike(prompts, values, saved)
    first = values[0]
    if isinstance(first, VirtualTokens):
        tokens = [v.embeddings for v in values if isinstance(v, VirtualTokens)]
        mean: Value = replace(first, embeddings=_weighted(tokens, shares))
    else:
        prefixes = [v for v in values if isinstance(v, KVPrefix)]
        mean = replace(
            first,
            keys=tuple(_weighted(layer, shares) for layer in zip(*(v.keys for v in prefixes), strict=True)),
            values=tuple(_weighted(layer, shares) for layer in zip(*(v.values for v in prefixes), strict=True)),
        )
    if not saved:
        return cast(AnyPrompt, mean)
    method = _method("average", saved) | {"weights": shares}
    head = _mean_head([prompt.head for prompt in saved if prompt.head is not None], shares)
    return cast(AnyPrompt, replace(saved[0], value=mean, method=method, metrics={}, name=_name(saved), head=head))


def _shares(count: int, weights: Sequence[float] | None) -> list[float]:
    given = [1.0] * count if weights is None else [float(weight) for weight in weights]
    total = math.fsum(given)
    if len(given) != count or min(given) < 0 or not 0 < total < math.inf:
        raise ConfigError(
            expected=f"{count} weights, one per prompt, of 0 or more and not all 0",
            got=", ".join(map(str, given[:8])) or "none",
            do="give every prompt a weight, or leave weights out to weigh all alike",
        )
    return [weight / total for weight in given]


def _weighted(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    return torch.stack([tensor * share for tensor, share in zip(tensors, shares, strict=True)]).sum(0)


def _check_alike(prompts: Sequence[object], values: Sequence[Value], saved: Sequence[SoftPrompt]) -> None:
    def require(error: type[OvertureError], what: str, found: Iterable[str]) -> None:
        distinct = list(dict.fromkeys(found))
        if len(distinct) > 1:
            raise error(
                expected=f"prompts of one {what}",
                got=" and ".join(distinct[:3]),
                do="average prompts that one method tuned with the same options on the same model",
            )

    require(ConfigError, "kind", (type(prompt).__name__ for prompt in prompts))
    require(BaseMismatchError, "base model", (f"{p.base.architecture} {p.base.digest[:12]}" for p in saved))
    require(ConfigError, "kind", (type(value).__name__ for value in values))
    require(BaseMismatchError, "shape", (_shape(value) for value in values))
    require(ConfigError, "place", (_place(value) for value in values))
    require(ConfigError, "template", (repr(p.template.source) if p.template else "no template" for p in saved))
    require(ConfigError, "head", (_head(prompt.head) for prompt in saved))


def _head(head: Head | None) -> str:
    if head is None:
        return "no head"
    shapes = {name: list(tensor.shape) for name, tensor in sorted(head.tensors.items())}
    return f"{head.task} into {', '.join(head.labels)} {head.words or shapes}"


def _mean_head(heads: Sequence[Head], shares: Sequence[float]) -> Head | None:
    if not heads:
        return None
    tensors = {name: _weighted([head.tensors[name] for head in heads], shares) for name in heads[0].tensors}
    return replace(heads[0], tensors=tensors)


def _place(value: Value) -> str:
    if isinstance(value, VirtualTokens):
        return "before special tokens" if value.before_specials else "behind special tokens"
    return "counted as positions" if value.counted else "at no positions of its own"


def _shape(value: Value) -> str:
    shapes = [str(list(tensor.shape)) for tensor in value.tensors().values()]
    parts = value.parts if isinstance(value, KVPrefix) else None
    found = ", ".join(f"{shapes.count(shape)} x {shape}" for shape in dict.fromkeys(shapes))
    return found if parts is None else f"{found} for {'+'.join(parts)}"


def _method(name: str, prompts: Sequence[SoftPrompt]) -> dict[str, Any]:
    return {"name": name, "of": [prompt.name for prompt in prompts]}


def _name(prompts: Sequence[SoftPrompt]) -> str:
    return "+".join(prompt.name for prompt in prompts)
