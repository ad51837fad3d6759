"""A frozen model prepared for prompts: hooks that turn the rows set by `prompts` into what a forward pass understands.

Shape suffixes: B rows, T text.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from transformers import PreTrainedModel

from overture import dispatch
from overture.errors import BaseMismatchError, ConfigError, ContextLengthError, ModelInUseError, UnsupportedModelError
from overture.prompt import KVPrefix, SoftPrompt, Value, VirtualTokens
from overture.runtime.attention import Path, PlainAttention, PrefixAttention
from overture.runtime.embedding import TokenRows
from overture.runtime.rows import PrefixRows, repeats
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


def stands_in_text(spec: ModelSpec, prompt: SoftPrompt | Value | None) -> bool:
    """True if a prompt's virtual tokens take positions of the input (the embedding seam).

    Leading virtual tokens of most decoders do not: they are run ahead of the text and enter as a `KVPrefix`.
    """
    value = prompt.value if isinstance(prompt, SoftPrompt) else prompt
    if not isinstance(value, VirtualTokens):
        return False
    template = prompt.template if isinstance(prompt, SoftPrompt) else None
    return not (spec.runs_ahead and (template is None or template.leading))


@dataclass(slots=True, eq=False)
class Seam:
    """What the hooks of one model read. `torch.compile` can follow them here, and nowhere beyond."""

    active: bool = False
    """True while prompts are set."""
    window: TokenRows | None = None
    """What the embedding of this forward pass writes over its input."""
    written: bool = False
    """True once it did."""


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
        self.lock = threading.Lock()
        self.owner: Owner | None = None
        self.rows: Rows | None = None
        self.first_length: int | None = None
        self.seam = Seam()

    @property
    def stacks(self) -> list[PreTrainedModel]:
        """The models through which text enters: one, or an encoder and a decoder."""
        return [cast(PreTrainedModel, stack()) for stack in self._stacks]

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
            if _embedded not in embedding._forward_hooks.values():
                embedding.register_forward_hook(_embedded)
                # Code that was compiled before the hooks would go on without them.
                torch.compiler.reset()
        for outside in (model, inner):
            # The halves of an encoder-decoder enter one by one, each with its own text.
            if _is_compiled(outside) and len(host.stacks) == 1 and _HOSTS.get(outside) is not host:
                host._hook(outside)
        return host

    def _hook(self, entrance: nn.Module) -> None:
        # Plain functions that look the host up: a pickled or copied model takes its hooks along.
        self._know(entrance)
        if _before not in entrance._forward_pre_hooks.values():
            entrance.register_forward_pre_hook(_before, with_kwargs=True)
            entrance.register_forward_hook(_done)
            entrance.register_forward_hook(_after, always_call=True)

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
            self.seam.active, self.seam.window = self.rows is not None, None

    def check(self, value: Value) -> None:
        """Raise `BaseMismatchError` unless the value has this model's shape."""
        got: list[Any]
        wanted: list[Any]
        if isinstance(value, VirtualTokens):
            self._require_text()
            got, wanted = list(value.embeddings.shape[1:]), [self.spec.hidden_size]
            what = "virtual tokens of the model's hidden size"
        else:
            self.spec.require_prefix()
            got = [_shape(k, v) for k, v in zip(value.keys, value.values, strict=False)]
            self._check_parts(value)
            length = value.length
            layers = self.spec.layers_of(value.parts)
            wanted = [(s.kv_heads, length, s.key_dim, length, s.value_dim) for s in layers]
            what = "keys and values of the model's layers, heads and sizes (heads, P, key size, P, value size)"
            if len(value.keys) != len(value.values):
                got.append("layers without a partner")
        if got != wanted:
            raise BaseMismatchError(
                expected=f"{what}: {_brief(wanted)}",
                got=_brief(got),
                do=f"use a prompt tuned for this {self.spec.base.architecture} model",
            )

    def _require_text(self) -> None:
        if not self.spec.reads_text:
            raise UnsupportedModelError(
                expected="a model that reads text, for virtual tokens at its input",
                got=f"{self.spec.base.architecture}, whose encoder reads something else",
                do="use Prefix Tuning on this model",
            )

    def _check_parts(self, value: KVPrefix) -> None:
        unknown = set(value.parts or ()) - set(self.spec.parts)
        if unknown or value.parts == ():
            raise BaseMismatchError(
                expected=f"a prefix for parts that the model has: {', '.join(self.spec.parts)}",
                got=", ".join(sorted(unknown)) or "none",
                do="use a prompt tuned for this model; only encoder-decoders have the parts encoder, decoder and cross",
            )

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before a forward pass of a stack: turn the rows into keywords, which survive recomputation."""
        rows = self.rows
        if rows is None or (rows.prefixes is None and rows.tokens is None):
            return None
        self._require_owner()
        parameters = inspect.signature(getattr(module, "_orig_mod", module).forward).parameters
        kwargs = dict(zip(parameters, args, strict=False)) | kwargs
        start, text = _start(kwargs, rows), _text(kwargs)
        times = self._times(rows, text if start == 0 else None, text.shape[0])
        outside = module not in self.stacks
        if outside:
            _check_keywords(parameters)
            kwargs[dispatch.KEYWORD] = PlainAttention()
        if outside or module is self.stacks[0]:
            kwargs |= self._placed(rows, kwargs, start, times)
        if rows.prefixes is not None:
            kwargs[dispatch.KEYWORD] = PrefixAttention(
                rows.prefixes.repeated(times),
                self.layers,
                path=rows.path,
                windows=self.windows if rows.in_window else None,
                positions=_first_axis(kwargs.get("position_ids")),
            )
        return (), kwargs

    def numbered(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before a model around a stack numbers the positions: number the text without its padding.

        Padding may not stand between a prefix and the text.
        """
        kwargs = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
        if self.rows is None or kwargs.get("position_ids") is not None or self.spec.first_position is None:
            return None
        text = _text(kwargs)
        nothing = torch.zeros(1, dtype=torch.long)
        kwargs["position_ids"] = self._positions(kwargs, text.shape[1], _start(kwargs, self.rows), nothing)
        return (), kwargs

    def _placed(self, rows: Rows, kwargs: Mapping[str, Any], start: int, times: int) -> dict[str, Any]:
        """Virtual tokens in their places, and the positions of the text behind each row's own prefix."""
        placed: dict[str, Any] = {}
        ids: Tensor | None = kwargs.get("input_ids")
        length = (kwargs["inputs_embeds"] if ids is None else ids).shape[1]
        if rows.tokens is not None:
            window = rows.tokens.window(start, length, times)
            if ids is None:
                placed["inputs_embeds"] = window.write(kwargs["inputs_embeds"])
            else:
                # What reads ids beside the embeddings (per-layer inputs, padding) shall find the same id everywhere.
                placed["input_ids"] = ids.masked_fill(window.slots.to(ids.device) >= 0, 0)
                self.seam.window, self.seam.written = window, False
        if self.spec.first_position is not None:
            offsets = torch.zeros(1, dtype=torch.long)
            if rows.prefixes is not None:
                offsets = rows.prefixes.lengths["self"].repeat_interleave(times)
            placed["position_ids"] = self._positions(kwargs, length, start, offsets)
            self._check_room(placed["position_ids"], ahead=rows.prefixes is not None)
        return placed

    def _positions(
        self, kwargs: Mapping[str, Any], length: int, start: int, offsets: Int[Tensor, " B"]
    ) -> Int[Tensor, "... T"]:
        """Position ids of the text: each row starts at the length of its own prefix."""
        positions: Tensor | None = kwargs.get("position_ids")
        if positions is None:
            mask = kwargs.get("attention_mask")
            if isinstance(mask, Tensor) and mask.ndim == 2:
                positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
            else:
                positions = torch.arange(start, start + length, device=_text(kwargs).device)[None]
            positions = positions + (self.spec.first_position or 0)
        return positions + offsets.to(positions.device)[:, None]

    def _times(self, rows: Rows, text: Tensor | None, batch: int) -> int:
        """How often each row stands in the batch: once, or as often as `generate` repeats it."""
        times = repeats(batch, rows.count)
        if times is not None and times > 1 and rows.count > 1 and text is not None:
            # Beams repeat a row's text with it. Later passes without a cache have grown, each in its own way.
            self.first_length = min(text.shape[1], self.first_length or text.shape[1])
            groups = text[:, : self.first_length].unflatten(0, (rows.count, times))
            times = times if bool((groups == groups[:, :1]).all()) else None
        if times is None:
            raise ConfigError(
                expected=f"a batch of {rows.count} rows, one per prompt",
                got=f"a batch of {batch}",
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

    def _check_room(self, positions: Tensor, *, ahead: bool) -> None:
        if self.spec.learned_positions:
            limit, what = self.spec.max_positions, "positions"
        else:
            # Keys computed ahead of the text are those of a short one.
            limit, what = self.spec.rotary_limit if ahead else None, "positions, at which its rotary embedding changes"
        if limit is None:  # reading a number would wait for the device
            return
        count = int(positions.max()) - (self.spec.first_position or 0) + 1
        if count > limit:
            raise ContextLengthError(
                expected=f"virtual tokens and text within the model's {limit} {what}",
                got=f"{count} positions",
                do="shorten the text or use a prompt with fewer virtual tokens",
            )


_HOSTS: WeakKeyDictionary[nn.Module, Host] = WeakKeyDictionary()


def _seam(module: nn.Module) -> Seam:
    seam: Any = module.overture_seam
    return cast(Seam, seam)


def _before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # Compiled code gets here, too. Where its caller entered already, it has the keyword and goes straight on.
    if isinstance(kwargs.get(dispatch.KEYWORD), (PrefixAttention, PlainAttention)) or not _seam(module).active:
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
    return _number(module, args, kwargs) if _seam(module).active else None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _number(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    host = _HOSTS.get(module)
    return None if host is None else host.numbered(module, args, kwargs)


def _done(module: nn.Module, args: Any, output: Any) -> None:
    if _seam(module).window is not None and not _seam(module).written:
        raise UnsupportedModelError(
            expected="a model that reads token ids through its input embedding",
            got=f"{type(module).__name__}, which did not call it",
            do="use Prefix Tuning on this model, or pass inputs_embeds",
        )


def _after(module: nn.Module, args: Any, output: Any) -> None:
    if _seam(module).window is not None:
        _seam(module).window = None


def _embedded(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    window = _seam(module).window
    if window is None:
        return None
    _seam(module).written = True
    return window.write(output)


def _is_compiled(module: nn.Module) -> bool:
    """True if the module's forward pass is compiled, but not its hooks."""
    return isinstance(module, OptimizedModule) or hasattr(module.forward, "_torchdynamo_orig_callable")


def _check_keywords(parameters: Mapping[str, inspect.Parameter]) -> None:
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        raise UnsupportedModelError(
            expected="a compiled model that hands further keywords down to its attention",
            got=f"a forward pass that takes {', '.join(parameters)} alone",
            do="use prompts on the model itself, not compiled",
        )


def _start(kwargs: Mapping[str, Any], rows: Rows) -> int:
    """Positions before this pass, which a cache holds."""
    past, state = kwargs.get("past_key_values"), kwargs.get("cache_params")
    if past is not None:
        return int(past.get_seq_length())
    if state is not None and rows.tokens is not None and state.has_previous_state():
        # A recurrent state (Mamba) does not count. The input that filled it had every place of a virtual token.
        return rows.tokens.slots.shape[1]
    return 0


def _me() -> Owner:
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop runs in this thread
        task = None
    return threading.get_ident(), id(task)


def _text(kwargs: Mapping[str, Any]) -> Tensor:
    """What tells the rows of a forward pass apart: a decoder's rows begin alike, and differ in what they look at."""
    names = ("encoder_hidden_states", "input_ids", "inputs_embeds")
    found: Tensor = next(kwargs[name] for name in names if kwargs.get(name) is not None)
    return found


def _first_axis(positions: Tensor | None) -> Tensor | None:
    """Positions in time, where they have further axes for places in a picture."""
    return positions if positions is None or positions.ndim < 3 else positions[0]


def _shape(key: Tensor, value: Tensor) -> tuple[int, ...]:
    return (*key.shape, *value.shape[1:])


def _brief(shapes: Sequence[Any]) -> str:
    same = len(set(shapes)) == 1
    return f"{len(shapes)} x {shapes[0]}" if same and len(shapes) > 1 else ", ".join(map(str, shapes[:8]))
