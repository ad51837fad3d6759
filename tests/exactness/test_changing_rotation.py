"""Rotary embeddings that change for all positions with the length of the text (dynamic NTK, longrope).

Keys that were computed ahead are those of a short text. Up to the length at which the rotation changes they are exact;
beyond it they would be wrong without a word, so a longer text is refused. Virtual tokens in the text stay exact.
Oracle: the plain model reading the words, in fp64 as in `test_words.py`.
"""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from overture.errors import ContextLengthError
from overture.prompt import SoftPrompt, VirtualTokens
from overture.runtime.generate import generate_ids
from overture.runtime.prompts import prompts
from overture.spec import ModelSpec

TOLERANCE = {"rtol": 0.0, "atol": 1e-9}
WORDS = torch.tensor([7, 50, 12, 33, 8])
LIMIT = 16
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(params=["dynamic", "longrope"])
def model(request):
    torch.manual_seed(1)
    rope = {"rope_theta": 10000.0, "rope_type": request.param, "factor": 4.0}
    if request.param == "dynamic":
        config = LlamaConfig(**SIZES, max_position_embeddings=LIMIT, rope_parameters=rope)
        return LlamaForCausalLM(config).double().eval().requires_grad_(False)
    rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": LIMIT}
    config = Phi3Config(
        **SIZES, max_position_embeddings=64, original_max_position_embeddings=LIMIT, rope_parameters=rope
    )
    return Phi3ForCausalLM(config).double().eval().requires_grad_(False)


def words(model):
    return VirtualTokens(model.get_input_embeddings()(WORDS[None])[0])


def test_a_prefix_up_to_the_length_at_which_the_rotation_changes(model):
    assert ModelSpec.of(model).rotary_limit == LIMIT
    text = torch.arange(3, 3 + LIMIT)[None]
    wanted = model(input_ids=torch.cat([WORDS[None], text[:, : LIMIT - 5]], dim=1)).logits[:, 5:]
    with prompts(model, words(model)):
        torch.testing.assert_close(model(input_ids=text[:, : LIMIT - 5]).logits, wanted, **TOLERANCE)
        with pytest.raises(ContextLengthError, match=r"16 positions, at which its rotary embedding changes"):
            model(input_ids=text[:, : LIMIT - 4])


def test_virtual_tokens_in_the_text_at_any_length(model, pad):
    text = torch.arange(3, 3 + LIMIT + 4)
    batch, _ = pad([text], "right", [[0] * 5])
    with prompts(model, words(model), batch):
        got = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    torch.testing.assert_close(got, model(input_ids=torch.cat([WORDS, text])[None]).logits, **TOLERANCE)


def test_generation_stops_where_the_rotation_changes(model, pad):
    batch, _ = pad([torch.arange(3, 10)], "left")
    prompt = SoftPrompt(words(model), ModelSpec.of(model).base)
    new = generate_ids(model, [prompt], batch, filler=0, max_new_tokens=30, eos_token_id=None)
    assert new.shape == (1, LIMIT - 5 - 7)
