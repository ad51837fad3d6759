"""Small models of the four shapes that people use, with weights large enough that every layer's attention matters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.masking_utils import eager_mask

from overture.runtime.reading import Encoded

VOCAB = 61
SHAPES = ("llama", "gpt2", "qwen3", "gemma3")

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(shape: str, attention: str = "sdpa", dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A random model. fp64, so that what is left of a difference is a mistake and not rounding."""
    torch.manual_seed(1)
    model: PreTrainedModel
    if shape == "llama":
        model = LlamaForCausalLM(LlamaConfig(**_COMMON))
    elif shape == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**_COMMON))
    elif shape == "gemma3":
        layers = ["sliding_attention", "full_attention", "sliding_attention"]
        model = Gemma3ForCausalLM(Gemma3TextConfig(**_COMMON, sliding_window=48, layer_types=layers))
    else:
        special = {
            k: _COMMON[k] for k in ("vocab_size", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id")
        }
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, **special))
    model.config._attn_implementation = attention
    return model.to(dtype).eval().requires_grad_(False)


class Padded(NamedTuple):
    """A batch of texts of different lengths and where each stands in it."""

    batch: Encoded
    windows: list[slice]


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(shape: str) -> PreTrainedModel:
    return build(shape)


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    return build


@pytest.fixture
def texts() -> list[Tensor]:
    """Texts of different lengths, without special tokens."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, VOCAB, (n,), generator=generator) for n in (9, 4, 6, 7, 1, 5)]


@pytest.fixture
def pad() -> Callable[..., Padded]:
    """Pads texts on either side; `places` reserves positions inside a text for its row's virtual tokens."""

    def padded(texts: Sequence[Tensor], side: str, places: Sequence[Sequence[int] | None] | None = None) -> Padded:
        rows = [_placed(text, None if places is None else places[i]) for i, text in enumerate(texts)]
        width = max(len(ids) for ids, _ in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask, slots = torch.zeros_like(ids), torch.full_like(ids, -1)
        windows = []
        for i, (row, slot) in enumerate(rows):
            window = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            ids[i, window], mask[i, window], slots[i, window] = row, 1, slot
            windows.append(window)
        return Padded(Encoded(ids, mask, slots if places is not None else None), windows)

    return padded


def _placed(text: Tensor, before: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """`text` with a place for virtual token i before its token `before[i]`."""
    ids, slots = [], []
    for position in range(len(text) + 1):
        for index, at in enumerate(before or ()):
            if at == position:
                ids.append(0)
                slots.append(index)
        if position < len(text):
            ids.append(int(text[position]))
            slots.append(-1)
    return torch.tensor(ids), torch.tensor(slots)


@pytest.fixture
def attending() -> Callable[..., AbstractContextManager[PreTrainedModel]]:
    return _attending


Prefix = tuple[nn.Module, Tensor, Tensor]
"""An attention module, and the keys [K, P, D] and values [K, P, E] that its queries see beside the text's."""


@contextmanager
def _attending(model: PreTrainedModel, prefixes: Sequence[Prefix]) -> Iterator[PreTrainedModel]:
    """`model` under an attention function of its own, written out below: the oracle where the plain model has none.

    Positions are the caller's. One entry per attention call, in order: a shared module has several.
    """
    calls: Counter[int] = Counter()

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        groups = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(groups, 1).mT * scale
        if kwargs.get("position_bias") is not None:
            scores = scores + kwargs["position_bias"]
        if mask is not None:
            scores = scores + mask[..., : scores.shape[-1]]
        elif module.is_causal and scores.shape[-2] > 1:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -torch.inf)
        own = [(k, v) for m, k, v in prefixes if m is module]
        if own:
            prefix_key, prefix_value = own[calls[id(module)] % len(own)]
            calls[id(module)] += 1
            seen = query @ prefix_key.repeat_interleave(groups, 0).mT * scale
            scores = torch.cat([seen, scores], -1)
            value = torch.cat([prefix_value.expand(len(value), -1, -1, -1), value], 2)
        return (scores.softmax(-1) @ value.repeat_interleave(groups, 1)).transpose(1, 2), None

    AttentionInterface.register("explicit", attend)
    AttentionMaskInterface.register("explicit", eager_mask)
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = "explicit"
        yield model
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
