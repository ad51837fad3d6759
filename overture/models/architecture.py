"""The embedded model's shape: a small Llama, so that every engine that serves Llama serves it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sizes of the embedded model."""

    vocab_size: int = 4096
    """Tokens of the tokenizer."""
    hidden_size: int = 256
    """Width of the residual stream."""
    num_hidden_layers: int = 6
    """Decoder layers."""
    num_attention_heads: int = 4
    """Query heads per layer."""
    num_key_value_heads: int = 2
    """Key and value heads per layer: grouped queries, as in most served models."""
    head_dim: int = 64
    """Width of one head."""
    intermediate_size: int = 512
    """Width of the gated MLP."""
    max_position_embeddings: int = 512
    """Longest text, in tokens, virtual tokens included."""

    def config(self) -> LlamaConfig:
        """The transformers config; token ids follow `tokenizer.SPECIALS`."""
        from dataclasses import asdict

        from transformers import LlamaConfig

        return LlamaConfig(
            **asdict(self),
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
