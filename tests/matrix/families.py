"""One tiny model of every family in the matrix, its random weights large enough for attention to matter everywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers as tf
from transformers import PreTrainedModel

__all__ = ["FAMILIES", "POSITIONS", "VOCAB", "WINDOW", "Family"]

VOCAB = 61
POSITIONS = 160
WINDOW = 6
"""Sliding windows are shorter than the texts and than the longer prompts."""

Kind = Literal["decoder", "encoder", "encoder-decoder"]


@dataclass(frozen=True, slots=True)
class Family:
    """A family of models, as the compatibility table lists it."""

    name: str
    kind: Kind
    make: Callable[[], PreTrainedModel]
    sliding: bool = False
    """Some layers look through a window of `WINDOW` tokens."""
    hybrid: bool = False
    """Positions also meet in convolutions or recurrent states."""
    no_prefix: bool = False
    """Attention does not run through transformers' attention interface: prefixes are refused."""
    deep: bool = True
    """What enters a block is one vector per position."""
    single: bool = False
    """The modeling code takes some of its sums in fp32 whatever its weights are, so that fp32 is what it can show."""

    def build(self, dtype: torch.dtype | None = None, attention: str | None = None) -> PreTrainedModel:
        """A frozen model of this family, the same at every call; fp64, so that what differs is a mistake."""
        torch.manual_seed(1)
        model = self.make()
        if hasattr(model.config, "num_experts_per_tok"):
            model.set_experts_implementation("eager")  # the grouped product knows no fp64
        if model.can_generate():
            # Texts of one length each: nothing ends a text early.
            model.generation_config.eos_token_id = None
            model.generation_config.pad_token_id = 0
        if attention is not None:
            model.set_attn_implementation(attention)
        if dtype is None:
            dtype = torch.float32 if self.single else torch.float64
        return model.to(dtype).eval().requires_grad_(False)

    @property
    def slug(self) -> str:
        """The name as part of a test's id."""
        return self.name.lower().replace(" ", "-")


_TOKENS: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_RANGE: dict[str, Any] = {"initializer_range": 0.3, "max_position_embeddings": POSITIONS}
_COMMON = _TOKENS | _SIZES | _RANGE
_GROUPED = _COMMON | {"num_key_value_heads": 2}
_ENCODER = {k: v for k, v in _COMMON.items() if k not in ("bos_token_id", "eos_token_id")}
_EYE: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
_EYE |= {"image_size": 8, "patch_size": 4}
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}


def _of(model: str, config: str, /, **options: Any) -> Callable[[], PreTrainedModel]:
    """A maker of the named transformers model. By name, because older releases lack some."""
    return lambda: getattr(tf, model)(getattr(tf, config)(**options))


def _sampled(model: str, config: str, /, **options: Any) -> Callable[[], PreTrainedModel]:
    """As `_of`, for models whose own start leaves weights at zero or one: every number is drawn."""

    def make() -> PreTrainedModel:
        built = _of(model, config, **options)()
        for parameter in built.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        return built

    return make


FAMILIES: tuple[Family, ...] = (
    Family("Llama", "decoder", _of("LlamaForCausalLM", "LlamaConfig", **_GROUPED)),
    Family("Mistral", "decoder", _of("MistralForCausalLM", "MistralConfig", **_GROUPED, sliding_window=WINDOW), True),
    Family("Qwen2", "decoder", _of("Qwen2ForCausalLM", "Qwen2Config", **_GROUPED)),
    Family("Qwen3", "decoder", _of("Qwen3ForCausalLM", "Qwen3Config", **_GROUPED, head_dim=16)),
    Family(
        "Gemma 2",
        "decoder",
        _of(
            "Gemma2ForCausalLM",
            "Gemma2Config",
            **_GROUPED,
            **_ALTERNATING,
            head_dim=8,
            query_pre_attn_scalar=8,
            attn_logit_softcapping=5.0,
        ),
        sliding=True,
        single=True,
    ),
    Family(
        "Gemma 3", "decoder", _of("Gemma3ForCausalLM", "Gemma3TextConfig", **_GROUPED, **_ALTERNATING, head_dim=8), True
    ),
    Family(
        "Gemma 3n",
        "decoder",
        _sampled(
            "Gemma3nForCausalLM",
            "Gemma3nTextConfig",
            **_GROUPED | {"num_hidden_layers": 4},
            head_dim=8,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"] * 2,
            vocab_size_per_layer_input=VOCAB,
            hidden_size_per_layer_input=8,
            num_kv_shared_layers=2,
            laurel_rank=4,
            altup_num_inputs=2,
        ),
        sliding=True,
        deep=False,
    ),
    Family(
        "Gemma 4",
        "decoder",
        _sampled(
            "Gemma4ForCausalLM",
            "Gemma4TextConfig",
            **_GROUPED | {"num_hidden_layers": 4},
            head_dim=8,
            global_head_dim=16,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"] * 2,
            vocab_size_per_layer_input=VOCAB,
            hidden_size_per_layer_input=8,
            num_kv_shared_layers=2,
        ),
        sliding=True,
    ),
    Family("Phi-3", "decoder", _of("Phi3ForCausalLM", "Phi3Config", **_GROUPED)),
    Family("Mixtral", "decoder", _of("MixtralForCausalLM", "MixtralConfig", **_GROUPED, num_local_experts=4)),
    Family(
        "GPT-2",
        "decoder",
        _of(
            "GPT2LMHeadModel",
            "GPT2Config",
            **_TOKENS,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=POSITIONS,
            initializer_range=0.3,
        ),
    ),
    Family("GPT-NeoX", "decoder", _of("GPTNeoXForCausalLM", "GPTNeoXConfig", **_COMMON)),
    Family(
        "OPT",
        "decoder",
        _of(
            "OPTForCausalLM",
            "OPTConfig",
            **_TOKENS,
            hidden_size=32,
            word_embed_proj_dim=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=48,
            max_position_embeddings=POSITIONS,
            init_std=0.3,
            dropout=0.0,
        ),
    ),
    Family(
        "DeepSeek-V3",
        "decoder",
        _of(
            "DeepseekV3ForCausalLM",
            "DeepseekV3Config",
            **_COMMON,
            num_key_value_heads=4,
            moe_intermediate_size=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=12,
        ),
        single=True,
    ),
    Family(
        "Qwen3-Next",
        "decoder",
        _of(
            "Qwen3NextForCausalLM",
            "Qwen3NextConfig",
            **_GROUPED,
            head_dim=16,
            layer_types=["linear_attention", "full_attention"],
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            num_experts=4,
            num_experts_per_tok=2,
        ),
        hybrid=True,
        single=True,
    ),
    Family(
        "LFM2",
        "decoder",
        _of("Lfm2ForCausalLM", "Lfm2Config", **_GROUPED, layer_types=["conv", "full_attention"]),
        hybrid=True,
    ),
    Family(
        "LLaVA (text side)",
        "decoder",
        lambda: tf.LlavaForConditionalGeneration(
            tf.LlavaConfig(
                text_config=tf.LlamaConfig(**_GROUPED | {"vocab_size": VOCAB + 1}),
                vision_config=tf.CLIPVisionConfig(**_EYE),
                image_token_id=VOCAB,
            )
        ),
    ),
    Family(
        "Qwen2.5-VL (text side)",
        "decoder",
        lambda: tf.Qwen2_5_VLForConditionalGeneration(
            tf.Qwen2_5_VLConfig(
                text_config=_GROUPED
                | {"vocab_size": VOCAB + 4}
                | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
                vision_config={"depth": 1, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2}
                | {"intermediate_size": 24, "fullatt_block_indexes": [0]},
                image_token_id=VOCAB,
                video_token_id=VOCAB + 1,
                vision_start_token_id=VOCAB + 2,
                vision_end_token_id=VOCAB + 3,
            )
        ),
    ),
    Family("BERT", "encoder", _of("BertForMaskedLM", "BertConfig", **_ENCODER)),
    Family("RoBERTa", "encoder", _of("RobertaForMaskedLM", "RobertaConfig", **_ENCODER | {"pad_token_id": 1})),
    Family("ELECTRA", "encoder", _of("ElectraForMaskedLM", "ElectraConfig", **_ENCODER, embedding_size=16)),
    Family("ALBERT", "encoder", _of("AlbertForMaskedLM", "AlbertConfig", **_ENCODER, embedding_size=16)),
    Family(
        "DistilBERT",
        "encoder",
        _of(
            "DistilBertForMaskedLM",
            "DistilBertConfig",
            vocab_size=VOCAB,
            dim=32,
            n_layers=2,
            n_heads=4,
            hidden_dim=48,
            max_position_embeddings=POSITIONS,
            initializer_range=0.3,
        ),
    ),
    Family(
        "ModernBERT",
        "encoder",
        _of(
            "ModernBertForMaskedLM",
            "ModernBertConfig",
            **_COMMON,
            cls_token_id=1,
            sep_token_id=2,
            local_attention=WINDOW,
            layer_types=["full_attention", "sliding_attention"],
        ),
        sliding=True,
    ),
    Family(
        "T5",
        "encoder-decoder",
        _of(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=VOCAB,
            d_model=32,
            d_kv=6,
            d_ff=48,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            initializer_factor=1.0,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        ),
    ),
    Family(
        "BART",
        "encoder-decoder",
        _of(
            "BartForConditionalGeneration",
            "BartConfig",
            **_TOKENS,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=POSITIONS,
            init_std=0.3,
            decoder_start_token_id=1,
            dropout=0.0,
            forced_eos_token_id=None,
        ),
    ),
    Family(
        "GPT-J",
        "decoder",
        _of(
            "GPTJForCausalLM",
            "GPTJConfig",
            **_TOKENS,
            n_embd=32,
            n_layer=2,
            n_head=4,
            rotary_dim=4,
            n_positions=POSITIONS,
            initializer_range=0.3,
        ),
        no_prefix=True,
        single=True,
    ),
    Family(
        "GPT-Neo",
        "decoder",
        _of(
            "GPTNeoForCausalLM",
            "GPTNeoConfig",
            **_TOKENS,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            intermediate_size=48,
            attention_types=[[["global", "local"], 1]],
            window_size=WINDOW,
            max_position_embeddings=POSITIONS,
            initializer_range=0.3,
        ),
        no_prefix=True,
        single=True,
    ),
    Family(
        "BLOOM",
        "decoder",
        _of("BloomForCausalLM", "BloomConfig", **_TOKENS, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3),
        no_prefix=True,
        single=True,
    ),
    Family(
        "Falcon",
        "decoder",
        _of("FalconForCausalLM", "FalconConfig", **_COMMON, new_decoder_architecture=False),
        no_prefix=True,
        single=True,
    ),
    Family(
        "MPT",
        "decoder",
        _of(
            "MptForCausalLM",
            "MptConfig",
            **_TOKENS,
            d_model=32,
            n_heads=4,
            n_layers=2,
            expansion_ratio=2,
            max_seq_len=POSITIONS,
            initializer_range=0.3,
        ),
        no_prefix=True,
        single=True,
    ),
    Family(
        "Mamba",
        "decoder",
        _of(
            "MambaForCausalLM",
            "MambaConfig",
            **_TOKENS,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=4,
            initializer_range=0.3,
        ),
        hybrid=True,
        no_prefix=True,
        single=True,
    ),
    Family(
        "DeBERTa-v2",
        "encoder",
        _of("DebertaV2ForMaskedLM", "DebertaV2Config", **_ENCODER),
        no_prefix=True,
    ),
)
