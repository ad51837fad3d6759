"""Small random models with heads, in fp64, and tokenizers in the manner of BERT, RoBERTa and T5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BartConfig,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
)

TEXT = "the a cat dog film tea ship was is good bad great awful it . , who sat on mat paris rome ann bob lives in"
WORDS = TEXT.split()
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = ["##s", "##ly", "##ed", "##er"]
VOCAB = len(SPECIALS + WORDS + PIECES)

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_ENCODER: dict[str, Any] = _SIZES | {"initializer_range": 0.3, "max_position_embeddings": 64}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "bert": lambda: BertConfig(vocab_size=VOCAB, pad_token_id=0, **_ENCODER),
    "roberta": lambda: RobertaConfig(vocab_size=VOCAB, pad_token_id=0, **_ENCODER),
    "electra": lambda: ElectraConfig(vocab_size=VOCAB, pad_token_id=0, embedding_size=32, **_ENCODER),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=VOCAB,
        pad_token_id=0,
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=48,
        max_position_embeddings=64,
        initializer_range=0.3,
    ),
    "llama": lambda: LlamaConfig(
        vocab_size=VOCAB, pad_token_id=0, bos_token_id=2, eos_token_id=3, num_key_value_heads=2, **_ENCODER
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    ),
    "t5": lambda: T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=6,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=3,
        initializer_factor=2.0,
    ),
    "bart": lambda: BartConfig(
        vocab_size=VOCAB,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
        init_std=0.3,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        decoder_start_token_id=3,
        forced_eos_token_id=None,
    ),
}
AUTO: dict[str, Any] = {
    "sequence-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "question-answering": AutoModelForQuestionAnswering,
    "masked-lm": AutoModelForMaskedLM,
    "seq2seq": AutoModelForSeq2SeqLM,
}


def build(name: str, task: str, **changes: Any) -> PreTrainedModel:
    """A random model of a family for a task. fp64: what is left of a difference is a mistake and not rounding."""
    torch.manual_seed(1)
    config = CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    model: PreTrainedModel = AUTO[task].from_config(config)
    return model.double().eval()


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    return build


def make_tokenizer(*, types: bool = True, around: str = "[CLS] $A [SEP]", pair: str | None = None) -> Any:
    """WordPiece over a few words, with what the model is told of two texts. Words it does not know are [UNK]."""
    vocabulary = {word: i for i, word in enumerate(SPECIALS + WORDS + PIECES)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single=around,
        pair=pair or "[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, i) for i, name in enumerate(SPECIALS)],
    )
    named = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=["input_ids", *(["token_type_ids"] if types else []), "attention_mask"],
        **{f"{name}_token": SPECIALS[i] for name, i in named.items()},
    )


@pytest.fixture
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """For BERT; for another `family` of the test one that knows no second text."""
    return make_tokenizer(types="family" not in request.fixturenames or request.getfixturevalue("family") == "bert")


@pytest.fixture
def reviews() -> list[dict[str, Any]]:
    """Rows that can be learned, of different lengths."""
    texts = [
        "the film was",
        "it is",
        "a cat sat on the mat , it was",
        "tea is",
        "the ship was",
        "who sat on a mat ? it is",
    ]
    pairs = [("good", "yes"), ("awful", "no"), ("great", "yes"), ("bad", "no")]
    return [{"text": f"{text} {word} .", "label": label} for text in texts for word, label in pairs]
