"""A frozen model prepared for prompts: `prompts(model, rows)` says which prompt stands before which row.

Shape suffixes: B rows, T text.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from overture import dispatch
from overture.errors import BaseMismatchError, ConfigError, ContextLengthError, ModelInUseError
from overture.prompt import KVPrefix, SoftPrompt, Value, VirtualTokens
from overture.runtime.attention import PrefixAttention
from overture.runtime.embedding import TokenRows
from overture.runtime.rows import PrefixRows, repeats
from overture.spec import ModelSpec, attention_modules

__all__ = ["Host", "Rows", "stands_in_text"]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The prompts of one batch, ready to enter the model."""

    count: int
    """Rows named by the caller; 1 serves any batch."""
    prefixes: PrefixRows | None
    """What enters at the attention seam."""
    tokens: TokenRows | None
    """What enters at the embedding seam."""


def stands_in_text(spec: ModelSpec, prompt: SoftPrompt | Value | None) -> bool:
    """True if a prompt's virtual tokens take positions of the input (the embedding seam).

    Leading virtual tokens of a decoder do not: they are run ahead of the text and enter as a `KVPrefix`.
    """
    value = prompt.value if isinstance(prompt, SoftPrompt) else prompt
    if not isinstance(value, VirtualTokens):
        return False
    template = prompt.template if isinstance(prompt, SoftPrompt) else None
    leading = template is None or template.leading
    return not (leading and spec.is_decoder and spec.refusal is None)


class Host:
    """The seams of one model: installed once, idle and bit-exact until prompts are set."""

    _hosts: ClassVar[WeakKeyDictionary[nn.Module, Host]] = WeakKeyDictionary()

    def __init__(self, model: PreTrainedModel) -> None:
        self.spec = ModelSpec.of(model)
        self.compiled: WeakKeyDictionary[SoftPrompt, KVPrefix] = WeakKeyDictionary()
        modules = attention_modules(model, self.spec.layers) if self.spec.refusal is None else []
        self.layer_of = {id(module): index for index, module in enumerate(modules)}
        self.arguments = list(inspect.signature(model.forward).parameters)
        self.owner: int | None = None
        self.rows: Rows | None = None
        self.window: TokenRows | None = None
        model.register_forward_pre_hook(self._enter, with_kwargs=True)
        model.register_forward_hook(self._leave, always_call=True)
        model.get_input_embeddings().register_forward_hook(self._embed)

    @classmethod
    def of(cls, model: PreTrainedModel) -> Host:
        """The model's host, made at the first call. Also re-attaches if the attention implementation was changed."""
        host = cls._hosts.get(model)
        if host is None:
            host = cls._hosts[model] = cls(model)
        if host.spec.refusal is None:
            dispatch.attach(model)
        return host

    @contextmanager
    def using(self, rows: Rows | None) -> Iterator[None]:
        """Set the rows for forward passes inside; contexts nest within one thread.

        Raises:
            ModelInUseError: another thread has prompts set on this model.
        """
        thread = threading.get_ident()
        if self.owner not in (None, thread):
            raise ModelInUseError(
                expected="one thread at a time to set prompts on a model",
                got="another thread inside prompts() on the same model",
                do="put all rows into one batch, or give each thread its own model",
            )
        before = (self.owner, self.rows)
        self.owner, self.rows = thread, rows
        try:
            yield
        finally:
            self.owner, self.rows = before

    def check(self, value: Value) -> None:
        """Raise `BaseMismatchError` unless the value has this model's shape."""
        got: list[Any]
        wanted: list[Any]
        if isinstance(value, VirtualTokens):
            got, wanted = [value.embeddings.shape[1]], [self.spec.hidden_size]
            what = "virtual tokens of the model's hidden size"
        else:
            self.spec.require_prefix()
            got = [(k.shape[0], k.shape[2], v.shape[2]) for k, v in zip(value.keys, value.values, strict=True)]
            wanted = [(layer.kv_heads, layer.key_dim, layer.value_dim) for layer in self.spec.layers]
            what = "keys and values of the model's layers, heads and sizes"
        if got != wanted:
            raise BaseMismatchError(
                expected=f"{what}: {_brief(wanted)}",
                got=_brief(got),
                do=f"use a prompt tuned for this {self.spec.base.architecture} model",
            )

    def _enter(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before a forward pass: turn the rows into keywords, which survive recomputation."""
        rows = self.rows
        if rows is None or (rows.prefixes is None and rows.tokens is None):
            return None
        kwargs = dict(zip(self.arguments, args, strict=False)) | kwargs
        ids = kwargs.get("input_ids")
        batch, length = (kwargs["inputs_embeds"] if ids is None else ids).shape[:2]
        times = repeats(batch, rows.count)
        if times is None:
            raise ConfigError(
                expected=f"a batch of {rows.count} rows, one per prompt (or a multiple, as beams make it)",
                got=f"a batch of {batch}",
                do="name one prompt (or None) for every row",
            )
        past = kwargs.get("past_key_values")
        start = int(past.get_seq_length()) if past is not None else 0
        if rows.tokens is not None:
            self.window = rows.tokens.window(start, length, times)
        if rows.prefixes is not None:
            prefixes = rows.prefixes.repeated(times)
            self._check_room(prefixes.longest + start + length)
            if "position_ids" in self.arguments:
                kwargs["position_ids"] = _positions(kwargs, length, start, prefixes.lengths)
            kwargs[dispatch.KEYWORD] = PrefixAttention(prefixes, self.layer_of)
        return (), kwargs

    def _leave(self, model: nn.Module, args: Any, output: Any) -> None:
        self.window = None

    def _embed(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return None if self.window is None else self.window.write(output)

    def _check_room(self, positions: int) -> None:
        limit = self.spec.max_positions
        if self.spec.learned_positions and limit is not None and positions > limit:
            raise ContextLengthError(
                expected=f"virtual tokens and text within the model's {limit} positions",
                got=f"{positions} positions",
                do="shorten the text or use a prompt with fewer virtual tokens",
            )


def _positions(kwargs: Mapping[str, Any], length: int, start: int, offsets: Int[Tensor, " B"]) -> Int[Tensor, "... T"]:
    """Position ids of the text: each row starts at the length of its own prefix."""
    positions: Tensor | None = kwargs.get("position_ids")
    if positions is None:
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        else:
            positions = torch.arange(start, start + length, device=offsets.device)[None]
    return positions + offsets.to(positions.device)[:, None]


def _brief(shapes: Sequence[Any]) -> str:
    same = len(set(shapes)) == 1
    return f"{len(shapes)} x {shapes[0]}" if same and len(shapes) > 1 else ", ".join(map(str, shapes[:8]))
