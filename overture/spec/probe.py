"""What a few forward passes of two tokens tell about a model: its attention calls, and what its positions mean."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from overture import dispatch
from overture.spec.modules import (
    backbone,
    embedding_table,
    execution_device,
    handing_on,
    stacks,
    text_encoder,
    token_embedding,
)

__all__ = ["AttentionLayer", "first_position", "hands_on_masks", "meets_in_attention_only", "record"]

_FIRST_POSITIONS = 4


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One call of the attention function, in the order in which a forward pass makes them."""

    name: str
    """Path of the attention module below the backbone, such as `layers.3.self_attn`."""
    part: str
    """`"self"`; in an encoder-decoder `"encoder"`, `"decoder"` (its self-attention) or `"cross"`."""
    block: str
    """Path of the transformer block around it, such as `layers.3`; empty if there is none."""
    heads: int
    """Heads of queries."""
    kv_heads: int
    """Heads of keys and values, before they are repeated for grouped queries."""
    key_dim: int
    """Size of a key, per head."""
    value_dim: int
    """Size of a value, per head."""
    causal: bool
    """True if a position sees no later one."""
    window: int | None
    """Length of the sliding window in tokens, or None for full attention."""


@dataclass(frozen=True, slots=True)
class _Call:
    """One attention call as it was seen."""

    module: nn.Module
    shape: tuple[int, int, int, int]
    """Query heads, key heads, key size, value size."""
    causal: bool
    window: int | None
    crosses: bool
    """True if queries and keys are of different texts."""


class _Recorder(dispatch.AttentionWitness):
    """Notes which module called with which shapes."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []

    def note(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]) -> None:
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        # A module may know of a window that this layer of it does not have (EXAONE 4): what the call says counts first.
        window = options.get("sliding_window", getattr(module, "sliding_window", None)) or None
        shape = (query.shape[1], key.shape[1], key.shape[3], value.shape[3])
        self.calls.append(_Call(module, shape, bool(causal), window, crosses=query.shape[2] != key.shape[2]))


class _SelfOnly:
    """An attention handler that lets every position see itself alone, and notes the masks that it was given instead."""

    def __init__(self) -> None:
        self.masks: list[Any] = []

    def attend(
        self,
        inner: dispatch.AttentionFunction,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        self.masks.append(attention_mask)
        hidden = ~torch.eye(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        mask = torch.zeros_like(hidden, dtype=query.dtype).masked_fill(hidden, torch.finfo(query.dtype).min)
        return inner(module, query, key, value, mask[None, None], **kwargs)


def record(model: PreTrainedModel) -> tuple[tuple[AttentionLayer, ...], str | None]:
    """Run the smallest input through the backbone: the attention calls, and why a prefix cannot enter (or None)."""
    dispatch.install()
    recorder = _Recorder()
    try:
        with handing_on(model, recorder):
            backbone(model)(**_inputs(model))
    except TypeError as error:
        return (), f"its forward pass takes no further keywords ({error})"
    if not recorder.calls:
        return (), "its attention does not run through transformers' attention interface"
    return tuple(_layers(model, recorder.calls)), None


def first_position(model: PreTrainedModel, layers: Sequence[AttentionLayer]) -> int | None:
    """The position of a text's first token, or None where the model takes no positions.

    Most models count from 0, some from the number behind a padding token's (RoBERTa). Of the possible ones, the right
    one gives what the model computes when it counts for itself. An encoder-decoder's prefix stands at no position.
    """
    if model.config.is_encoder_decoder:
        return None
    entrance = stacks(model, layers)[0]
    if "position_ids" not in inspect.signature(entrance.forward).parameters:
        return None
    ids = _plain_ids(model, 2)[None]

    def states(**kwargs: Any) -> Tensor:
        hidden: Tensor = entrance(input_ids=ids, **kwargs)[0]
        return hidden.float()

    tables = [module for module in entrance.modules() if isinstance(module, nn.Embedding)]
    behind = {int(table.padding_idx) + 1 for table in tables if table.padding_idx is not None}
    end = getattr(entrance.config, "max_position_embeddings", None) or torch.inf
    candidates = [first for first in sorted({*range(_FIRST_POSITIONS)} | behind) if first + 1 < end]
    counted = states()
    positions = torch.arange(2, device=ids.device)[None]
    far = [float((states(position_ids=positions + first) - counted).abs().max()) for first in candidates]
    return candidates[far.index(min(far))]


def meets_in_attention_only(model: PreTrainedModel, layers: Sequence[AttentionLayer]) -> bool:
    """True if a position learns of the one before it through attention alone, and not through a convolution or a state.

    Two inputs differ in their first token only. With every position attending to itself alone, the second position
    must come out the same.
    """
    entrance = stacks(model, layers)[0]
    one, two, last = _plain_ids(model, 3)
    first, second = (
        entrance(input_ids=torch.stack([ids, last])[None], use_cache=False, **{dispatch.KEYWORD: _SelfOnly()})[0][
            0, 1
        ].float()
        for ids in (one, two)
    )
    return bool(torch.allclose(first, second, rtol=1e-3, atol=1e-3 * float(first.abs().max())))


def hands_on_masks(model: PreTrainedModel, layers: Sequence[AttentionLayer], first: int) -> bool:
    """True if attention is given the mask that the model was given, and nothing that a layer made of it.

    Some choose by content what a position sees (Doge): of rows in one text, they would choose among all. `first` is the
    position of a text's first token.
    """
    ids, seen = _plain_ids(model, 2)[None], _SelfOnly()
    # One number for all positions: whatever a layer adds to it has more.
    given = {
        "attention_mask": torch.zeros(1, 1, 1, 1, device=ids.device),
        "position_ids": torch.arange(first, first + 2, device=ids.device)[None],
    }
    stacks(model, layers)[0](input_ids=ids, use_cache=False, **given, **{dispatch.KEYWORD: seen})
    return all(isinstance(mask, Tensor) and mask.numel() == 1 for mask in seen.masks)


def _plain_ids(model: PreTrainedModel, count: int) -> Tensor:
    """Ids of tokens that no model takes for padding."""
    rows = embedding_table(model).shape[0]
    padding = {
        model.config.get_text_config(decoder=True).pad_token_id,
        getattr(token_embedding(model), "padding_idx", None),
    }
    plain = [i for i in range(count + len(padding)) if i not in padding]
    return torch.tensor(plain[:count], device=execution_device(model)) % rows


def _inputs(model: PreTrainedModel) -> dict[str, Any]:
    """The smallest input: two tokens; for a decoder behind an encoder also three positions of the encoder."""
    device = execution_device(model)
    two, three = (torch.zeros(1, length, dtype=torch.long, device=device) for length in (2, 3))
    if not model.config.is_encoder_decoder:
        return {"input_ids": two}
    if text_encoder(model) is not None:
        return {"input_ids": three, "decoder_input_ids": two}
    # The encoder reads no text (Whisper): the decoder alone is run, on an encoder's output of zeros.
    states = torch.zeros(1, 3, model.config.hidden_size, dtype=model.dtype, device=device)
    return {"encoder_outputs": (states,), "decoder_input_ids": two}


def _layers(model: PreTrainedModel, calls: Sequence[_Call]) -> list[AttentionLayer]:
    base = backbone(model)
    names = {id(module): name for name, module in base.named_modules()}
    lists = {name for name, module in base.named_modules() if isinstance(module, nn.ModuleList)}
    encoder = text_encoder(model)
    encoding = set() if encoder is None else set(map(id, encoder.modules()))
    layers = []
    for call in calls:
        name = names[id(call.module)]
        part = "self"
        if model.config.is_encoder_decoder:
            part = "encoder" if id(call.module) in encoding else "cross" if call.crosses else "decoder"
        layers.append(AttentionLayer(name, part, _block(name, lists), *call.shape, call.causal, call.window))
    return layers


def _block(name: str, lists: set[str]) -> str:
    """The outermost ancestor of `name` that is an element of a module list."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        if ".".join(parts[:end]) in lists:
            return ".".join(parts[: end + 1])
    return ""
