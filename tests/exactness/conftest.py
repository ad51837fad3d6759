"""Small models of the four shapes that people use, with weights large enough that every layer's attention matters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import (
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

from overture.runtime.encode import Encoded

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
