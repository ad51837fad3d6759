"""A frozen model prepared for prompts: hooks that turn the rows set by `prompts` into what a forward pass understands.

Shape suffixes: B rows, T text.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from overture import dispatch
from overture.errors import ConfigError, ModelInUseError, UnsupportedModelError
from overture.prompt import KVPrefix, SoftPrompt, Value, VirtualTokens
from overture.runtime.attention import Path, PlainAttention, PrefixAttention
from overture.runtime.cached import growing
from overture.runtime.embedding import TokenRows
from overture.runtime.moved import Moved, bias_module, position_modules
from overture.runtime.packing import PackedAttention, Packing
from overture.runtime.passes import Pass, check_room, first_axis
from overture.runtime.rows import PrefixRows, repeats
from overture.runtime.seam import Seam, after, done, embedded, is_compiled, positioned, seam_of
from overture.spec import ModelSpec, attention_modules, stacks, surrounding, token_embedding, unwrapped

__all__ = ["Host", "Rows", "stands_in_text"]

Owner = tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The prompts of one batch, ready to enter the model."""

    count: int
    """Rows named by the caller; 1 serves any batch."""
    prefixes: PrefixRows | None
    """What enters at the attention seam."""
    tokens: TokenRows | None
    """What enters at the embedding seam."""
    path: Path = "auto"
    """How prefix and text come together in attention."""
    in_window: bool = False
    """True if prefixes drop out of sliding windows."""
    packing: Packing | None = None
    """Which token is of which row, where the rows stand end to end in one."""
    repeated: dict[int, PrefixRows] = field(default_factory=dict)
    """The prefixes by how often each row stands in a batch: every token that is generated asks for them again."""

    @property
    def empty(self) -> bool:
        """True if rows pass as they are."""
        return self.prefixes is None and self.tokens is None and self.packing is None


def stands_in_text(spec: ModelSpec, prompt: SoftPrompt | Value | None) -> bool:
    """True if a prompt's virtual tokens take positions of the input (the embedding seam).

    Leading virtual tokens of most decoders do not: they are run ahead of the text and enter as a `KVPrefix`.
    """
    value = prompt.value if isinstance(prompt, SoftPrompt) else prompt
    if not isinstance(value, VirtualTokens):
        return False
    template = prompt.template if isinstance(prompt, SoftPrompt) else None
    return not (spec.runs_ahead and (template is None or template.leading))


class Host:
    """The seams of one model: hooked once, idle and bit-exact until prompts are set."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.spec = ModelSpec.of(model)
        self.compiled: WeakKeyDictionary[SoftPrompt, KVPrefix] = WeakKeyDictionary()
        self.shifted: WeakKeyDictionary[SoftPrompt, dict[int, KVPrefix]] = WeakKeyDictionary()
        modules = attention_modules(model, self.spec.layers) if self.spec.refusal is None else []
        self.layers: dict[int, list[int]] = {}
        for index, module in enumerate(modules):
            self.layers.setdefault(id(module), []).append(index)
        self.windows = {i: layer.window for i, layer in enumerate(self.spec.layers) if layer.window is not None}
        # Hosts are kept for as long as their modules live, so they must not keep them alive.
        self._stacks = [weakref.ref(stack) for stack in stacks(model, self.spec.layers)]
        of_decoder = [m for m, layer in zip(modules, self.spec.layers, strict=False) if layer.part == "decoder"]
        self._bias = _weakly(bias_module(of_decoder))
        self._positions = [weakref.ref(table) for table in position_modules(self.stacks[-1])] if of_decoder else []
        self.lock = threading.Lock()
        self.owner: Owner | None = None
        self.rows: Rows | None = None
        self.first_length: int | None = None
        self.seam = Seam()

    @property
    def stacks(self) -> list[PreTrainedModel]:
        """The models through which text enters: one, or an encoder and a decoder."""
        return [cast(PreTrainedModel, stack()) for stack in self._stacks]

    @property
    def positions(self) -> list[nn.Module]:
        """The modules that embed the positions of an encoder-decoder's decoder."""
        return [cast(nn.Module, table()) for table in self._positions]

    @classmethod
    def of(cls, model: nn.Module) -> Host:
        """The model's host, made anew when the model's weights have changed."""
        inner = unwrapped(model)
        embedding = token_embedding(inner)
        host = _HOSTS.get(embedding)
        if host is None or host.spec is not ModelSpec.of(inner):
            host = _HOSTS[embedding] = cls(inner)
            for entrance in host.stacks:
                host._hook(entrance)
            around = surrounding(inner, host.spec.layers)
            if around is not None:
                host._know(around)
                if _numbered not in around._forward_pre_hooks.values():
                    around.register_forward_pre_hook(_numbered, with_kwargs=True)
            embedding.overture_seam = host.seam  # type: ignore[assignment]
            for table in host.positions:
                table.overture_seam = host.seam  # type: ignore[assignment]
                if positioned not in table._forward_hooks.values():
                    table.register_forward_hook(positioned, with_kwargs=True)
            if embedded not in embedding._forward_hooks.values():
                embedding.register_forward_hook(embedded)
                # Code that was compiled before the hooks would go on without them.
                torch.compiler.reset()
        for outside in (model, inner):
            # The halves of an encoder-decoder enter one by one, each with its own text.
            if is_compiled(outside) and len(host.stacks) == 1 and _HOSTS.get(outside) is not host:
                host._hook(outside)
        return host

    def _hook(self, entrance: nn.Module) -> None:
        # Plain functions that look the host up: a pickled or copied model takes its hooks along.
        self._know(entrance)
        if _before not in entrance._forward_pre_hooks.values():
            entrance.register_forward_pre_hook(_before, with_kwargs=True)
            entrance.register_forward_hook(done)
            entrance.register_forward_hook(after, always_call=True)

    def _know(self, module: nn.Module) -> None:
        _HOSTS[module] = self
        module.overture_seam = self.seam  # type: ignore[assignment]

    @contextmanager
    def using(self, rows: Rows | None) -> Iterator[None]:
        """Set the rows for forward passes inside; contexts nest within one thread or task.

        Raises:
            ModelInUseError: another thread or asyncio task has prompts set on this model.
        """
        with self.lock:
            self._require_owner()
            before = (self.owner, self.rows, self.first_length)
            self.owner, self.rows, self.first_length = _me(), rows, None
            self.seam.active = rows is not None
        try:
            yield
        finally:
            self.owner, self.rows, self.first_length = before
            self.seam.active, self.seam.window, self.seam.moved = self.rows is not None, None, None
            self.seam.take_back()

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before a forward pass of a stack: turn the rows into keywords, which survive recomputation."""
        rows = self.rows
        if rows is None or rows.empty:
            return None
        self._require_owner()
        entered = Pass.of(module, args, kwargs, rows.tokens)
        if rows.packing is not None:
            return (), entered.kwargs | self._packed(rows, rows.packing)
        times = self._times(rows, entered)
        new = dict(entered.kwargs)
        outside = module not in self.stacks
        if outside:
            _check_keywords(entered.parameters)
            new[dispatch.KEYWORD] = PlainAttention()
        if outside or module is self.stacks[0]:
            new |= self._placed(rows, entered, times)
        if rows.prefixes is not None:
            if times not in rows.repeated:
                rows.repeated[times] = rows.prefixes.repeated(times)
            prefixes = rows.repeated[times]
            moved = None
            if prefixes.moved is not None and module is self.stacks[-1]:
                moved = Moved(prefixes.moved, entered.start, None if self._bias is None else self._bias())
                moved.check(self.spec, entered.length, self.positions)
            self.seam.moved = moved
            self.seam.take_back()
            cache = growing(new.get("past_key_values"))
            if cache is not None and not (rows.path == "merge" or is_compiled(module)):
                self.seam.lend(cache, prefixes)
            new[dispatch.KEYWORD] = PrefixAttention(
                prefixes,
                self.layers,
                path=rows.path,
                windows=self.windows if rows.in_window else None,
                positions=first_axis(new.get("position_ids")),
                moved=moved,
                cache=self.seam.cache,
            )
        return (), new

    def numbered(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before a model around a stack numbers the positions: number the text without its padding.

        Padding may not stand between a prefix and the text.
        """
        rows = self.rows
        if rows is None or rows.empty or self.spec.first_position is None:
            return None
        entered = Pass.of(module, args, kwargs, rows.tokens)
        return (), entered.kwargs | {"position_ids": entered.positions(self.spec)}

    def _packed(self, rows: Rows, packing: Packing) -> dict[str, Any]:
        """What a pass over rows end to end is given: their positions, and attention that tells them apart."""
        handler: dispatch.AttentionHandler = PlainAttention()
        if rows.prefixes is not None:
            handler = PrefixAttention(rows.prefixes, self.layers, path=rows.path)
        ahead = None if rows.prefixes is None else rows.prefixes.lengths["self"]
        positions = packing.positions(self.spec.first_position or 0, ahead)
        check_room(self.spec, positions, ahead=rows.prefixes is not None)
        windows = {
            module: self.windows[layers[0]] for module, layers in self.layers.items() if layers[0] in self.windows
        }
        return {
            "position_ids": positions,
            # Four axes: the model takes it for a mask that is ready, and makes none of all tokens by all tokens.
            "attention_mask": torch.zeros(1, 1, 1, 1, device=positions.device),
            dispatch.KEYWORD: PackedAttention(handler, packing, windows),
        }

    def _placed(self, rows: Rows, entered: Pass, times: int) -> dict[str, Any]:
        """Virtual tokens in their places, and the positions of the text behind each row's own prefix."""
        placed: dict[str, Any] = {}
        if rows.tokens is not None:
            window = rows.tokens.window(entered.start, entered.length, times)
            ids: Tensor | None = entered.kwargs.get("input_ids")
            if ids is None:
                placed["inputs_embeds"] = window.write(entered.kwargs["inputs_embeds"])
            else:
                # What reads ids beside the embeddings (per-layer inputs, padding) shall find the same id everywhere.
                placed["input_ids"] = ids.masked_fill(window.slots.to(ids.device) >= 0, 0)
                self.seam.expect(window)
        if self.spec.first_position is not None:
            offsets = None if rows.prefixes is None else rows.prefixes.lengths["self"]
            if offsets is not None and times > 1:
                offsets = offsets.repeat_interleave(times)
            placed["position_ids"] = entered.positions(self.spec, offsets)
            check_room(self.spec, placed["position_ids"], ahead=rows.prefixes is not None)
        return placed

    def _times(self, rows: Rows, entered: Pass) -> int:
        """How often each row stands in the batch: once, or as often as `generate` repeats it."""
        text = entered.text
        times = repeats(len(text), rows.count)
        if times is not None and times > 1 and rows.count > 1 and entered.start == 0:
            # Beams repeat a row's text with it. Later passes without a cache have grown, each in its own way.
            self.first_length = min(text.shape[1], self.first_length or text.shape[1])
            groups = text[:, : self.first_length].unflatten(0, (rows.count, times))
            times = times if bool((groups == groups[:, :1]).all()) else None
        if times is None:
            raise ConfigError(
                expected=f"a batch of {rows.count} rows, one per prompt",
                got=f"a batch of {len(text)}",
                do="name one prompt (or None) for every row",
            )
        return times

    def _require_owner(self) -> None:
        if self.owner not in (None, _me()):
            raise ModelInUseError(
                expected="one thread or task at a time to use a model with prompts",
                got="another one inside prompts() on the same model",
                do="enter prompts() in the thread that runs the model, and put all rows into one batch",
            )


_HOSTS: WeakKeyDictionary[nn.Module, Host] = WeakKeyDictionary()


def _before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # Compiled code gets here, too. Where its caller entered already, it has the keyword and goes straight on.
    if isinstance(kwargs.get(dispatch.KEYWORD), (PrefixAttention, PlainAttention)) or not seam_of(module).active:
        return None
    return _enter(module, args, kwargs)


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="prompts are set for the model inside compiled code; enter prompts(...) on what torch.compile(model) "
    "returned, and call that, to have one graph"
)
def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    host = _HOSTS.get(module)
    return None if host is None else host.before(module, args, kwargs)


def _numbered(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _number(module, args, kwargs) if seam_of(module).active else None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _number(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    host = _HOSTS.get(module)
    return None if host is None else host.numbered(module, args, kwargs)


def _weakly(module: nn.Module | None) -> weakref.ref[nn.Module] | None:
    return None if module is None else weakref.ref(module)


def _check_keywords(parameters: Mapping[str, inspect.Parameter]) -> None:
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        raise UnsupportedModelError(
            expected="a compiled model that hands further keywords down to its attention",
            got=f"a forward pass that takes {', '.join(parameters)} alone",
            do="use prompts on the model itself, not compiled",
        )


def _me() -> Owner:
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop runs in this thread
        task = None
    return threading.get_ident(), id(task)
