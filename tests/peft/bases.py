"""Small random base models and tokenizers in the manner of theirs, and what Overture and PEFT compute with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from peft import PeftModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

import overture as ov

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
TEXT = "the a cat dog film tea ship was is good bad great awful it sat on mat paris rome ann bob lives in"
WORDS = TEXT.split()
VOCAB = len(SPECIALS + WORDS)
TEXTS = ["the cat sat on the mat", "tea is good", "ann lives in paris , it was a great ship"]
"""Of different lengths, so that two of three are padded."""
ANSWER = torch.tensor([[3, 7, 12, 5]])
"""What a decoder behind an encoder reads."""
AUTO: dict[str, Any] = {
    "CAUSAL_LM": tf.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": tf.AutoModelForSeq2SeqLM,
    "SEQ_CLS": tf.AutoModelForSequenceClassification,
    "TOKEN_CLS": tf.AutoModelForTokenClassification,
    "QUESTION_ANS": tf.AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": tf.AutoModel,
}

_SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
_COMMON: dict[str, Any] = _SIZES | {
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "initializer_range": 0.3,
    "max_position_embeddings": 64,
}
_GROUPED = _COMMON | {"num_key_value_heads": 2, "head_dim": 12}
_T5 = {"vocab_size": VOCAB, "d_model": 32, "d_ff": 48, "num_heads": 4, "decoder_start_token_id": 0, "pad_token_id": 0}
CONFIGS: dict[str, Any] = {
    "llama": lambda: tf.LlamaConfig(**_GROUPED),
    "qwen3": lambda: tf.Qwen3Config(**_GROUPED),
    "gemma2": lambda: tf.Gemma2Config(**_GROUPED, query_pre_attn_scalar=12, sliding_window=48),
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=0.3, pad_token_id=0
    ),
    "opt": lambda: tf.OPTConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=48, init_std=0.3,
        max_position_embeddings=64, word_embed_proj_dim=32, pad_token_id=0,
    ),
    "gptj": lambda: tf.GPTJConfig(
        vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=64, rotary_dim=8, initializer_range=0.3,
        pad_token_id=0, bos_token_id=2, eos_token_id=3,
    ),
    "bert": lambda: tf.BertConfig(**_COMMON),
    "roberta": lambda: tf.RobertaConfig(**_COMMON),
    "electra": lambda: tf.ElectraConfig(**_COMMON, embedding_size=32),
    "t5": lambda: tf.T5Config(**_T5, d_kv=8, num_layers=3, eos_token_id=3, initializer_factor=2.0),
    "bart": lambda: tf.BartConfig(
        vocab_size=VOCAB, d_model=32, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, init_std=0.3,
        pad_token_id=0, bos_token_id=2, eos_token_id=3, decoder_start_token_id=3, forced_eos_token_id=None,
    ),
}  # fmt: skip
DECODERS = ("llama", "qwen3", "gemma2", "gpt2", "opt")
ENCODERS = ("bert", "roberta", "electra")


def tolerance(family: str) -> dict[str, float]:
    """For logits in fp64. Some families take the sums of their norms in fp32, whatever their weights are."""
    return {"rtol": 0.0, "atol": 1e-5 if family in ("llama", "qwen3", "gemma2", "t5") else 1e-9}


def build(family: str, task: str, dtype: torch.dtype = torch.float64, **changes: Any) -> tf.PreTrainedModel:
    """A random model, the same at every call. fp64: what is left of a difference is a mistake and not rounding."""
    torch.manual_seed(1)
    config = CONFIGS[family]()
    for key, value in changes.items():
        setattr(config, key, value)
    model: tf.PreTrainedModel = AUTO[task].from_config(config)
    return model.to(dtype).eval().requires_grad_(False)


def tokenizer(family: str) -> Any:
    """Words, with the family's special tokens around them: none behind a decoder's text, none before T5's."""
    vocabulary = {word: i for i, word in enumerate(SPECIALS + WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    around = "$A" if family == "gpt2" else "[CLS] $A" if family in (*DECODERS, "gptj") else "[CLS] $A [SEP]"
    around = "$A [SEP]" if family == "t5" else around
    backend.post_processor = processors.TemplateProcessing(
        single=around, pair=f"{around} $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    named = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "bos": "[CLS]", "eos": "[SEP]"}
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=["input_ids", "attention_mask"],
        **{f"{name}_token": token for name, token in named.items()},
    )


def outputs(model: Any, task: str, **inputs: Any) -> Tensor:
    """Logits, or the states of a model without a head."""
    if task == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = ANSWER.expand(len(next(iter(inputs.values()))), -1)
    with torch.no_grad():
        out = model(**inputs)
    if task == "QUESTION_ANS":
        return torch.stack([out.start_logits, out.end_logits], dim=-1)
    found: Tensor = out.last_hidden_state if task == "FEATURE_EXTRACTION" else out.logits
    return found


def ours(
    model: tf.PreTrainedModel, family: str, task: str, prompt: ov.SoftPrompt | None, texts: Sequence[str], side: str
) -> list[Tensor]:
    """Overture's logits of every text, of one padded batch."""
    rows = [prompt] * len(texts)
    batch = ov.encode(
        tokenizer(family), list(texts), rows, spec=ov.ModelSpec.of(model), padding_side=side, complete=True
    )
    with ov.prompts(model, rows, batch):
        found = outputs(model, task, **batch.inputs())
    if task in ("SEQ_CLS", "SEQ_2_SEQ_LM"):
        return list(found)
    text = batch.attention_mask.bool() & (True if batch.slots is None else batch.slots < 0)
    return [row[kept] for row, kept in zip(found, text, strict=True)]


def theirs(
    model: PeftModel, family: str, task: str, texts: Sequence[str], *, task_id: int | None = None
) -> list[Tensor]:
    """PEFT's logits of every text alone and without padding, which it gets right."""
    rows = []
    for text in texts:
        ids = torch.tensor([tokenizer(family)(text).input_ids])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if task_id is not None:
            inputs["task_ids"] = torch.tensor([task_id])
        found = outputs(model, task, **inputs)[0]
        # Virtual tokens in the input have outputs of their own, in front.
        rows.append(found if task in ("SEQ_CLS", "SEQ_2_SEQ_LM") else found[-ids.shape[1] :])
    return rows


def loaded(folder: Path, family: str, task: str, **changes: Any) -> PeftModel:
    """The adapter as PEFT loads it, on a base model of its own."""
    return PeftModel.from_pretrained(build(family, task, **changes), str(folder)).eval()
