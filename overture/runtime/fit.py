"""Whether a value fits a model: its sizes, its layers, and the parts of an encoder-decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from overture.errors import BaseMismatchError, UnsupportedModelError
from overture.prompt import KVPrefix, Value, VirtualTokens
from overture.spec import ModelSpec

__all__ = ["require_fit"]


def require_fit(spec: ModelSpec, value: Value) -> None:
    """Raise `BaseMismatchError` unless the value has this model's shape."""
    got: list[Any]
    wanted: list[Any]
    if isinstance(value, VirtualTokens):
        _require_text(spec)
        got, wanted = list(value.embeddings.shape[1:]), [spec.hidden_size]
        what = "virtual tokens of the model's hidden size"
    else:
        spec.require_prefix()
        got = [_shape(k, v) for k, v in zip(value.keys, value.values, strict=False)]
        _require_parts(spec, value)
        length = value.length
        layers = spec.layers_of(value.parts)
        wanted = [(s.kv_heads, length, s.key_dim, length, s.value_dim) for s in layers]
        what = "keys and values of the model's layers, heads and sizes (heads, P, key size, P, value size)"
        if len(value.keys) != len(value.values):
            got.append("layers without a partner")
    if got != wanted:
        raise BaseMismatchError(
            expected=f"{what}: {_brief(wanted)}",
            got=_brief(got),
            do=f"use a prompt tuned for this {spec.base.architecture} model",
        )


def _require_text(spec: ModelSpec) -> None:
    if not spec.reads_text:
        raise UnsupportedModelError(
            expected="a model that reads text, for virtual tokens at its input",
            got=f"{spec.base.architecture}, whose encoder reads something else",
            do="use Prefix Tuning on this model",
        )


def _require_parts(spec: ModelSpec, value: KVPrefix) -> None:
    if value.counted and (spec.first_position is not None or value.parts != ("decoder",)):
        raise BaseMismatchError(
            expected=f"a prefix that {spec.base.architecture} can take",
            got="one that counts as positions of an encoder-decoder's decoder",
            do="use a prompt tuned for this model",
        )
    unknown = set(value.parts or ()) - set(spec.parts)
    if unknown or value.parts == ():
        raise BaseMismatchError(
            expected=f"a prefix for parts that the model has: {', '.join(spec.parts)}",
            got=", ".join(sorted(unknown)) or "none",
            do="use a prompt tuned for this model; only encoder-decoders have the parts encoder, decoder and cross",
        )


def _shape(key: Tensor, value: Tensor) -> tuple[int, ...]:
    return (*key.shape, *value.shape[1:])


def _brief(shapes: Sequence[Any]) -> str:
    same = len(set(shapes)) == 1
    return f"{len(shapes)} x {shapes[0]}" if same and len(shapes) > 1 else ", ".join(map(str, shapes[:8]))
