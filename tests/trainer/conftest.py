"""Small random models to train prompts on, a tokenizer of bytes, and rows that can be learned."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB = 258


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, with a padding and an end token."""
    ids = {"<pad>": 0, "<end>": 1} | {c: i + 2 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=ids, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>")


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    """Builds a random model, always the same one; fp64 by default, so that a difference is a mistake."""

    def make(shape: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 1) -> PreTrainedModel:
        torch.manual_seed(seed)
        special = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
        if shape == "llama":
            config = LlamaConfig(
                hidden_size=32,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=48,
                max_position_embeddings=128,
                initializer_range=0.3,
                attention_dropout=0.5,
                **special,
            )
            return LlamaForCausalLM(config).to(dtype)
        config = GPT2Config(
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_positions=128,
            initializer_range=0.3,
            resid_pdrop=0.5,
            embd_pdrop=0.5,
            attn_pdrop=0.5,
            **special,
        )
        return GPT2LMHeadModel(config).to(dtype)

    return make


@pytest.fixture
def model(make_model) -> PreTrainedModel:
    return make_model()


@pytest.fixture
def rows() -> Callable[..., list[dict[str, str]]]:
    """Prompts of different lengths, all with the same answer."""

    def make(answer: str = " aye", count: int = 12) -> list[dict[str, str]]:
        return [{"prompt": "ahoy mates"[: 3 + i % 7], "completion": answer} for i in range(count)]

    return make


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two rows of text, the second shorter and padded on the right; labels leave the padding out."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, VOCAB, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, 6:], mask[1, 6:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
