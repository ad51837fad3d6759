"""`generate`: how long it writes, what it returns, and whom it refuses. Oracle: the model's own `generate`."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from overture.errors import ContextLengthError, DataError, UnsupportedModelError
from overture.prompt import SoftPrompt, VirtualTokens
from overture.runtime.generate import generate
from overture.spec import ModelSpec

WORDS = [f"w{i}" for i in range(30)]
POSITIONS = 80


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def _config(vocab_size=30):
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=POSITIONS,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(_config()).eval()


def prompt(model, length):
    spec = ModelSpec.of(model)
    return SoftPrompt(VirtualTokens(torch.randn(length, spec.hidden_size)), spec.base)


def words(text):
    return len(text.split())


def test_as_many_tokens_as_asked_for_by_whichever_option(model, tokenizer):
    def written(**options):
        return words(generate(model, tokenizer, None, ["w1 w2 w3"], **options)[0])

    assert written() == 64
    assert written(max_new_tokens=7) == 7
    assert written(max_length=9) == 6
    assert written(generation_config=GenerationConfig(max_new_tokens=5, pad_token_id=0)) == 5
    assert written(generation_config=GenerationConfig(max_length=9, pad_token_id=0)) == 6


@pytest.mark.parametrize("options", [{}, {"max_new_tokens": 999}, {"max_length": 999}])
def test_no_more_than_fits_beside_prompt_and_input(model, tokenizer, options):
    soft = prompt(model, 20)
    texts = generate(model, tokenizer, [soft, None], ["w1 w2 w3", "w4"], **options)
    assert [words(text) for text in texts] == [POSITIONS - 20 - 3] * 2
    [last] = generate(model, tokenizer, soft, [" ".join(WORDS * 2)[: -len(" w29")]], **options)  # 79 of 80
    assert words(last) == 1
    with pytest.raises(ContextLengthError, match="80 positions, with room to answer"):
        generate(model, tokenizer, soft, [" ".join(WORDS * 2)], **options)


def test_a_dict_of_results_and_no_inputs(model, tokenizer):
    plain = generate(model, tokenizer, None, ["w1 w2"], max_new_tokens=4)
    assert generate(model, tokenizer, None, ["w1 w2"], max_new_tokens=4, return_dict_in_generate=True) == plain
    assert generate(model, tokenizer, None, []) == []


def test_models_that_cannot_generate(tokenizer):
    t5 = T5EncoderModel(T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(UnsupportedModelError, match="can generate, for causal-lm or seq2seq; got T5EncoderModel"):
        generate(t5, tokenizer, None, ["w1"])
    with pytest.raises(
        UnsupportedModelError, match="can generate, for causal-lm or seq2seq; got LlamaForSequenceClassification"
    ):
        generate(LlamaForSequenceClassification(_config()), tokenizer, None, ["w1"])


def test_another_models_tokenizer(tokenizer):
    with pytest.raises(DataError, match=r"token ids below 20.*got the id 25"):
        generate(LlamaForCausalLM(_config(20)), tokenizer, None, ["w1 w25"])
